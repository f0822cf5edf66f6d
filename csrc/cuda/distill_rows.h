// The loss and the gradient of a row of logits, from its statistics. Equal logits have a divergence of exactly 0, so
// products and sums must not be contracted (-fmad=false).
#pragma once

#include "cuda/statistics_rows.h"

namespace bbopd::cuda {

using rows::Divergence;

// What all columns of a row share.
struct DistillRow {
  const DistillArguments& a;
  float max, log_sum, plain_log_sum, kd_grad, ce_grad;
  std::int64_t label, id;
  bool has_kd;

  BBOPD_IN_BLOCK DistillRow(const DistillArguments& arguments, Index row, bool has_signal)
      : a(arguments),
        max(a.statistics[row]),
        log_sum(a.statistics[a.n + row]),
        plain_log_sum(a.ce_grad != nullptr ? a.statistics[2 * a.n + row] : 0.0F),
        kd_grad(a.kd_grad != nullptr ? a.kd_grad[row] : 0.0F),
        ce_grad(a.ce_grad != nullptr ? a.ce_grad[row] : 0.0F),
        label(a.labels != nullptr ? a.labels[row] : -1),
        id(a.ids != nullptr ? a.ids[row] : -1),
        has_kd(has_signal && a.kd_grad != nullptr) {}

  BBOPD_IN_BLOCK float log_q(float z) const { return (z - max) * a.inverse_temperature - log_sum; }

  // The gradient by `hidden @ weight.T`, from that of the divergence by the tempered logits.
  BBOPD_IN_BLOCK float gradient(float z, int column, float of_divergence) const {
    float g = has_kd ? kd_grad * of_divergence : 0.0F;
    if (a.ce_grad != nullptr) g += ce_grad * (std::exp(z - max - plain_log_sum) - (column == label ? 1.0F : 0.0F));
    if (a.inverse_cap != 0.0F) {
      const float t = z * a.inverse_cap;
      g *= 1.0F - t * t;
    }
    return g;
  }
};

// Which matrices can be read and written four numbers at a time.
struct DistillAligned {
  bool logits, gradient, teacher;
};

inline DistillAligned alignment_of(const DistillArguments& a) {
  return {is_aligned(a.logits), is_aligned(a.gradient), is_aligned(a.teacher)};
}

// What a thread has read of a row and its teacher's. A row's gradient may begin where its logits do: all threads have
// read their four, and a barrier is passed, before the first of them writes, to bytes that came no later in the row.
struct FourOfRow {
  float z[4], log_p[4];
};

// Cross-entropy, beside it a sampled token, the tail of a support, or nothing.
template <class Block>
BBOPD_IN_BLOCK void sparse_row(Block& block, const DistillArguments& a, DistillAligned aligned, Index row) {
  const DistillRow of(a, row, true);
  typename Block::template PerThread<FourOfRow> part;
  for (int first = 0; first < a.V; first += kStep) {
    block.each([&](int thread) {
      const int column = first + 4 * thread;
      if (column < a.V) read(a.logits, aligned.logits, row, column, a.V, part[thread].z);
    });
    block.lanes([&](int thread) {
      const int column = first + 4 * thread;
      if (column >= a.V) return;
      const FourOfRow& four = part[thread];
      float g[4];
      for (int i = 0; i < 4; ++i) {
        float gap = 0.0F;
        if (of.has_kd) gap = std::exp(of.log_q(four.z[i])) - (column + i == of.id ? 1.0F : 0.0F);
        g[i] = of.gradient(four.z[i], column + i, gap);
      }
      write(a.gradient, aligned.gradient, row, column, a.V, g);
    });
  }
}

// A row's divergence, its sum of q h, and how many log p were read as the floor.
struct Shares {
  float kd, mean;
  int floored;

  BBOPD_IN_BLOCK void add(const rows::Term<float>& term, int is_floored) {
    kd += term.kd;
    mean += term.qh;
    floored += is_floored;
  }
  BBOPD_IN_BLOCK void merge(const Shares& other) {
    kd += other.kd;
    mean += other.mean;
    floored += other.floored;
  }
};

// A whole distribution beside the row: the divergence, then the gradient; in one read where the gradient needs no mean.
template <Divergence kind, class Block>
BBOPD_IN_BLOCK void full_row(Block& block, const DistillArguments& a, DistillAligned aligned, Index row, Shares* room) {
  constexpr bool has_mean = rows::has_mean(kind);
  const bool has_signal = a.signal == nullptr || a.signal[row] != 0, has_gradient = a.gradient.data != nullptr;
  const DistillRow of(a, row, has_signal);
  const float teacher_max = a.teacher_statistics[row], teacher_log_sum = a.teacher_statistics[a.n + row];
  typename Block::template PerThread<Shares> part;
  float mean = 0.0F;

  const auto read_log_p = [&](int column, float (&log_p)[4]) {
    read(a.teacher, aligned.teacher, row, column, a.V, log_p);
    for (int i = 0; i < 4; ++i) {
      const float z = log_p[i] > rows::kInfinityStandIn ? rows::kInfinityStandIn : log_p[i];
      log_p[i] = (z - teacher_max) * a.inverse_temperature - teacher_log_sum;
    }
  };
  const auto term_of = [&](const rows::Class<float>& both) {
    return rows::term<kind, rows::Scalar<float>>(both.p, both.q, both.d, a.beta, a.skew);
  };

  // at once, as what is kept meanwhile is a register that the gradient lacks
  const auto write_shares = [&](const Shares& shares) {
    block.lanes([&](int thread) {
      if (thread != 0) return;
      a.shares[row] = shares.kd;
      a.shares[a.n + row] = shares.mean;
      a.shares[2 * a.n + row] = static_cast<float>(shares.floored);
    });
  };

  if (a.mean != nullptr) {
    mean = a.mean[row];
  } else if (has_mean || !has_gradient) {
    block.lanes([&](int thread) {
      Shares sums{0.0F, 0.0F, 0};
      for (int column = 4 * thread; has_signal && column < a.V; column += kStep) {
        float z[4], log_p[4];
        read(a.logits, aligned.logits, row, column, a.V, z);
        read_log_p(column, log_p);
        for (int i = 0; i < 4; ++i) {
          const auto both = rows::class_of<kind, rows::Scalar<float>>(log_p[i], of.log_q(z[i]));
          sums.add(term_of(both), both.floored);
        }
      }
      part[thread] = sums;
    });
    const Shares shares = reduce(block, part, room);
    write_shares(shares);
    mean = shares.mean;
  }
  if (has_gradient) {
    typename Block::template PerThread<FourOfRow> fours;
    block.lanes([&](int thread) { part[thread] = {0.0F, 0.0F, 0}; });
    for (int first = 0; first < a.V; first += kStep) {
      block.each([&](int thread) {
        const int column = first + 4 * thread;
        if (column >= a.V) return;
        read(a.logits, aligned.logits, row, column, a.V, fours[thread].z);
        if (has_signal) read_log_p(column, fours[thread].log_p);
      });
      block.lanes([&](int thread) {
        const int column = first + 4 * thread;
        if (column >= a.V) return;
        const FourOfRow& four = fours[thread];
        float g[4];
        for (int i = 0; i < 4; ++i) {
          float of_divergence = 0.0F;
          if (has_signal) {
            const auto both = rows::class_of<kind, rows::Scalar<float>>(four.log_p[i], of.log_q(four.z[i]));
            const auto term = term_of(both);
            if constexpr (has_mean) {
              of_divergence = term.qh - both.q * mean;
            } else {
              of_divergence = term.qh;
              part[thread].add(term, both.floored);
            }
          }
          g[i] = of.gradient(four.z[i], column + i, of_divergence);
        }
        write(a.gradient, aligned.gradient, row, column, a.V, g);
      });
    }
    if constexpr (!has_mean) write_shares(reduce(block, part, room));
  }
}

}  // namespace bbopd::cuda
