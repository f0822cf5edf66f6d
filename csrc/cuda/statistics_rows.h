// Logits finished, and the statistics of their rows. A thread has four columns in every 4 * kThreads.
#pragma once

#include "cuda/arguments.h"

namespace bbopd::cuda {

constexpr int kStep = 4 * kThreads;

// A maximum and the sums of exponentials below it, at a temperature and at 1 (Milakov & Gimelshein 1805.02867,
// algorithm 3, by fours).
struct RowSums {
  float max, tempered, plain, inverse;

  // not -inf: masked logits would make inf - inf of it
  static constexpr float kNoMaximum = -3.40282347e38F;
  static BBOPD_IN_BLOCK RowSums none(float inverse) { return {kNoMaximum, 0.0F, 0.0F, inverse}; }

  BBOPD_IN_BLOCK void add(const float (&z)[4], bool at_one) {
    float top = max;
    for (int i = 0; i < 4; ++i) top = z[i] > top ? z[i] : top;
    if (top > max) raise(top);
    for (int i = 0; i < 4; ++i) {
      const float above = z[i] - max;
      tempered += std::exp(above * inverse);
      if (at_one) plain += std::exp(above);
    }
  }

  BBOPD_IN_BLOCK void merge(RowSums other) {
    if (other.max > max) raise(other.max);
    other.raise(max);
    tempered += other.tempered;
    plain += other.plain;
  }

  BBOPD_IN_BLOCK void raise(float top) {
    tempered *= std::exp((max - top) * inverse);
    plain *= std::exp(max - top);
    max = top;
  }

  // The maximum as others read it: 0 of a row of nothing but -inf.
  BBOPD_IN_BLOCK float top() const { return tempered == 0.0F ? 0.0F : max; }
};

BBOPD_IN_BLOCK float finished(float z, const Finish& finish, int column) {
  if (finish.bias != nullptr) z += finish.bias[column];
  return finish.outer * (finish.is_capped ? std::tanh(z * finish.inner) : z);
}

BBOPD_IN_BLOCK void finish_four(const Finish& finish, int column, int V, float (&z)[4]) {
  for (int i = 0; i < 4; ++i)
    if (column + i < V) z[i] = finished(z[i], finish, column + i);
}

template <class Block>
BBOPD_IN_BLOCK void finish_row(Block& block, const FinishArguments& a, bool aligned, Index row) {
  block.lanes([&](int thread) {
    for (int column = 4 * thread; column < a.V; column += kStep) {
      float z[4];
      read(a.logits, aligned, row, column, a.V, z);
      finish_four(a.finish, column, a.V, z);
      write(a.logits, aligned, row, column, a.V, z);
    }
  });
}

template <class Block>
BBOPD_IN_BLOCK void statistics_row(Block& block, const StatisticsArguments& a, bool aligned, Index row, RowSums* room) {
  typename Block::template PerThread<RowSums> part;
  const bool is_read = a.signal == nullptr || a.signal[row] != 0;
  block.lanes([&](int thread) {
    RowSums sums = RowSums::none(a.inverse_temperature);
    for (int column = 4 * thread; column < a.V; column += kStep) {
      float z[4] = {};
      if (is_read) read(a.logits, aligned, row, column, a.V, z);
      for (int i = 0; i < 4; ++i) {
        if (a.is_teacher && z[i] > rows::kInfinityStandIn) z[i] = rows::kInfinityStandIn;
        if (column + i >= a.V) z[i] = -INFINITY;
      }
      sums.add(z, a.at_one);
    }
    part[thread] = sums;
  });
  const RowSums sums = reduce(block, part, room);
  block.lanes([&](int thread) {
    if (thread != 0) return;
    a.statistics[row] = sums.top();
    a.statistics[a.n + row] = sums.tempered;
    a.statistics[2 * a.n + row] = a.at_one ? sums.plain : sums.tempered;
  });
}

template <class Block>
BBOPD_IN_BLOCK void logprobs_row(Block& block, const LogprobsArguments& a, bool aligned, Index row, RowSums* room) {
  typename Block::template PerThread<RowSums> part;
  block.lanes([&](int thread) {
    RowSums sums = RowSums::none(1.0F);
    for (int column = 4 * thread; column < a.V; column += kStep) {
      float z[4];
      read(a.logits, aligned, row, column, a.V, z);
      finish_four(a.finish, column, a.V, z);
      sums.add(z, false);
    }
    part[thread] = sums;
  });
  const RowSums sums = reduce(block, part, room);
  const float lse = sums.top() + std::log(sums.tempered);
  block.lanes([&](int thread) {
    if (thread != 0) return;
    a.logsumexp[row] = lse;
    if (a.token_ids == nullptr) return;
    const std::int64_t token = a.token_ids[row];
    const bool is_inside = token >= 0 && token < a.V;
    const int column = is_inside ? static_cast<int>(token) : 0;
    const float z = static_cast<const float*>(a.logits.data)[row * a.logits.stride + column];
    a.sampled[row] = is_inside ? finished(z, a.finish, column) - lse : NAN;
  });
}

}  // namespace bbopd::cuda
