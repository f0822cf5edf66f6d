// The CUDA kernels on a host: the sources in csrc/cuda, over a block whose threads take turns between barriers, forwards
// or, with BBOPD_EMULATION=backwards, the last one first; a phase that needed a barrier inside would tell the two apart.
// Shared memory begins as NaN.
#include <array>
#include <cstdlib>
#include <cstring>
#include <string_view>
#include <vector>

#include "cuda/distill_rows.h"
#include "cuda/top_k_rows.h"

namespace bbopd::cuda {

namespace {

struct HostBlock {
  template <class T>
  using PerThread = std::array<T, kThreads>;

  bool is_backwards;

  template <class Body>
  void lanes(Body body) {
    for (int turn = 0; turn < kThreads; ++turn) body(is_backwards ? kThreads - 1 - turn : turn);
  }
  template <class Body>
  void each(Body body) {
    lanes(body);
  }
  template <class Condition>
  int count(Condition condition) {
    int found = 0;
    lanes([&](int thread) { found += condition(thread) ? 1 : 0; });
    return found;
  }
  void barrier() {}
  int add(int& counter, int amount) {
    const int before = counter;
    counter += amount;
    return before;
  }
  template <class T>
  PerThread<T> exchange(const PerThread<T>& part, int apart) {
    PerThread<T> other;
    for (int thread = 0; thread < kThreads; ++thread) other[thread] = part[thread ^ apart];
    return other;
  }
};

template <class Room>
void fill_with_nan(Room& room) {
  std::memset(static_cast<void*>(&room), 0xff, sizeof room);
}

template <class Body>
void each_row(Index n, Body body) {
  const char* order = std::getenv("BBOPD_EMULATION");
  HostBlock block{order != nullptr && std::string_view(order) == "backwards"};
  for (Index row = 0; row < n; ++row) body(block, row);
}

}  // namespace

void finish(const FinishArguments& a, Index n, Place) {
  each_row(n, [&](HostBlock& block, Index row) { finish_row(block, a, is_aligned(a.logits), row); });
}

void statistics(const StatisticsArguments& a, Place) {
  each_row(a.n, [&](HostBlock& block, Index row) {
    RowSums room[kWarps];
    fill_with_nan(room);
    statistics_row(block, a, is_aligned(a.logits), row, room);
  });
}

void distill(const DistillArguments& a, Place) {
  const DistillAligned aligned = alignment_of(a);
  each_row(a.n, [&](HostBlock& block, Index row) {
    if (a.teacher.data == nullptr) return sparse_row(block, a, aligned, row);
    Shares room[kWarps];
    fill_with_nan(room);
    rows::with_divergence(a.divergence, [&]<Divergence kind>() { full_row<kind>(block, a, aligned, row, room); });
  });
}

void logprobs(const LogprobsArguments& a, Index n, Place) {
  each_row(n, [&](HostBlock& block, Index row) {
    RowSums room[kWarps];
    fill_with_nan(room);
    logprobs_row(block, a, is_aligned(a.logits), row, room);
  });
}

void top_k(const TopKArguments& a, Index n, Place) {
  each_row(n, [&](HostBlock& block, Index row) {
    std::vector<TopKRoom> room(1);
    fill_with_nan(room[0]);
    TopKRow<HostBlock>{block, a, is_aligned(a.logits), row, room[0]}.run();
  });
}

}  // namespace bbopd::cuda
