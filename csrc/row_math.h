// The mathematics of one row: online softmax statistics, and each divergence's loss and gradient, over a whole
// vocabulary or over a few ids and a tail bucket. Every function is host and device code, written once over an
// arithmetic policy `M`, whose values `M::F` are one number or a vector of them; docs/objective.md derives the
// formulas.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define BBOPD_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BBOPD_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace bbopd::rows {

// Reverse KL reads a smaller teacher log-probability (a masked token, an empty tail) as this.
constexpr float kLogPFloor = -30.0F;
// Importance ratios of sampled tokens are truncated here.
constexpr float kRatioCap = 1e4F;
// A teacher logit of +inf takes all the mass of its row, without inf - inf.
constexpr float kInfinityStandIn = 1e30F;
// Stands in for -inf in a difference of logits or log-probabilities.
constexpr float kLowest = -1e9F;
// The exponential of this is finite in float, and that of its negative normal.
constexpr float kExpLimit = 80.0F;

enum class Divergence : int { forward_kl, reverse_kl, jsd, skew_forward_kl, skew_reverse_kl };

// Arithmetic on single numbers.
template <class One>
struct Scalar {
  using F = One;
  using Number = One;
  static constexpr int kWidth = 1;
  static BBOPD_HOST_DEVICE F load(const Number* from) { return *from; }
  static BBOPD_HOST_DEVICE void store(Number* to, F x) { *to = x; }
  static BBOPD_HOST_DEVICE Number sum(F x) { return x; }
  static BBOPD_HOST_DEVICE int count(bool is_set) { return is_set ? 1 : 0; }
  static BBOPD_HOST_DEVICE F exp(F x) { return std::exp(x); }
  static BBOPD_HOST_DEVICE F expm1(F x) { return std::expm1(x); }
  static BBOPD_HOST_DEVICE F log1p(F x) { return std::log1p(x); }
  static BBOPD_HOST_DEVICE F maximum(F a, F b) { return a > b ? a : b; }
  static BBOPD_HOST_DEVICE F minimum(F a, F b) { return a < b ? a : b; }
  static BBOPD_HOST_DEVICE F absolute(F x) { return x < F(0) ? -x : x; }
  static BBOPD_HOST_DEVICE F negate_where_negative(F value, F sign) { return sign < F(0) ? -value : value; }
};

// ---------------------------------------------------------------- softmax statistics

// A running maximum and the sum of exponentials below it (Milakov & Gimelshein 1805.02867, algorithm 3). Of nothing:
// (-inf, 0).
template <class Number>
struct LogSumExp {
  Number max = -INFINITY;
  Number sum = 0;

  BBOPD_HOST_DEVICE void add(Number x) {
    if (x > max) {
      sum = sum * std::exp(max - x) + Number(1);
      max = x;
    } else if (x == x && max == -INFINITY) {
      // -inf after nothing but -inf adds no mass
    } else {
      sum += std::exp(x - max);
    }
  }

  BBOPD_HOST_DEVICE void merge(const LogSumExp& other) {
    if (other.max > max) {
      sum = sum * (max == -INFINITY ? Number(0) : std::exp(max - other.max)) + other.sum;
      max = other.max;
    } else if (other.max != -INFINITY) {
      sum += other.sum * std::exp(other.max - max);
    } else {
      sum += other.sum;  // 0, or the NaN of a logit that was NaN
    }
  }

  BBOPD_HOST_DEVICE Number value() const {
    return max == -INFINITY && sum == Number(0) ? -INFINITY : max + std::log(sum);
  }
};

// ---------------------------------------------------------------- divergences

// One class's share: the divergence is the sum of `kd`, and its gradient by the student's tempered logits is qh - q *
// sum(qh).
template <class F>
struct Term {
  F kd, qh;
};

// q - p with a relative error of rounding even where they nearly agree; d = log p - log q.
template <class M, class F = typename M::F>
BBOPD_HOST_DEVICE F difference(F p, F q, F d) {
  return M::maximum(p, q) * M::negate_where_negative(M::expm1(-M::absolute(d)), d);
}

// d with log p read as no less than the floor, as reverse KL does.
template <class M, class F = typename M::F>
BBOPD_HOST_DEVICE F floored(F d, F log_q) {
  return M::maximum(d, kLogPFloor - log_q);
}

// The share of a class with probabilities p and q, d = log p - log q finite (any finite d serves where both are 0).
// Every `kd` vanishes to second order as q nears p, so that a sum of them is exact to rounding near 0, and not
// negative.
template <Divergence kind, class M, class F = typename M::F>
BBOPD_HOST_DEVICE Term<F> term(F p, F q, F d, F beta, F skew) {
  if constexpr (kind == Divergence::forward_kl) {
    // KL(p||q) = sum (q - p) + p d;  dKL/du = q - p
    const F gap = difference<M>(p, q, d);
    return {p * d + gap, gap};
  } else if constexpr (kind == Divergence::reverse_kl) {
    // KL(q||p) = sum (p - q) - q d;  h = -d
    const F qh = -(q * d);
    return {qh - difference<M>(p, q, d), qh};
  } else {
    const F limit = F{} + kExpLimit;
    const F near = M::maximum(M::minimum(d, limit), -limit);  // beyond it the term is settled, and expm1 would overflow
    if constexpr (kind == Divergence::jsd) {
      // m = beta p + (1 - beta) q;  log(m/p) = log1p((1 - beta) expm1(-d)), log(m/q) = log1p(beta expm1(d))
      const F log_mp = M::log1p((1.0F - beta) * M::expm1(-near));
      const F q_log_mq = q * M::log1p(beta * M::expm1(near));
      return {-(beta * (p * log_mp) + (1.0F - beta) * q_log_mq), (beta - 1.0F) * q_log_mq};
    } else if constexpr (kind == Divergence::skew_forward_kl) {
      // m = skew p + (1 - skew) q, x = m/p - 1;  KL(p||m) = sum (m - p) - p log1p(x);  q h = (1 - skew) q x / (1 + x)
      const F x = (1.0F - skew) * M::expm1(-near);
      return {(1.0F - skew) * difference<M>(p, q, near) - p * M::log1p(x), (1.0F - skew) * (q * (x / (1.0F + x)))};
    } else {
      // m = skew q + (1 - skew) p, y = m/q - 1;  KL(q||m) = sum (m - q) - q log1p(y);  h = skew y / (1 + y) - log1p(y)
      const F y = (1.0F - skew) * M::expm1(near);
      const F log_y = M::log1p(y);
      return {(skew - 1.0F) * difference<M>(p, q, near) - q * log_y, q * (skew * (y / (1.0F + y)) - log_y)};
    }
  }
}

// A class as `term` takes it, from log-probabilities of which -inf is a class without mass.
template <class F>
struct Class {
  F p, q, d;
  int floored;  // whether (of a vector how many) log p is read as its floor, as reverse KL does
};

template <Divergence kind, class M, class F = typename M::F>
BBOPD_HOST_DEVICE Class<F> class_of(F log_p, F log_q) {
  using Number = typename M::Number;
  const F lp = M::maximum(log_p, F{} + Number(kLowest)), lq = M::maximum(log_q, F{} + Number(kLowest));
  F d = lp - lq;
  int count = 0;
  if constexpr (kind == Divergence::reverse_kl) {
    count = M::count((log_p < Number(kLogPFloor)) & (log_q > Number(-INFINITY)));
    d = floored<M>(d, lq);
  }
  return {M::exp(lp), M::exp(lq), d, count};
}

// Of the divergences, forward KL alone has sum(qh) = 0 by itself.
constexpr bool has_mean(Divergence kind) { return kind != Divergence::forward_kl; }

// Calls `body.template operator()<kind>()` for a kind that is known at run time.
template <class Body>
BBOPD_HOST_DEVICE auto with_divergence(Divergence kind, Body&& body) {
  switch (kind) {
    case Divergence::reverse_kl:
      return body.template operator()<Divergence::reverse_kl>();
    case Divergence::jsd:
      return body.template operator()<Divergence::jsd>();
    case Divergence::skew_forward_kl:
      return body.template operator()<Divergence::skew_forward_kl>();
    case Divergence::skew_reverse_kl:
      return body.template operator()<Divergence::skew_reverse_kl>();
    default:
      return body.template operator()<Divergence::forward_kl>();
  }
}

// ---------------------------------------------------------------- a few ids and everything else

template <class Number>
struct BucketedRow {
  Number kd = 0;
  int floored = 0;  // classes whose log p reverse KL read as its floor
};

// The divergence of `classes` classes (the ids of a support, then its tail bucket; a multiple of the policy's width)
// that sum to 1 on both sides, and its gradient by the student's tempered logits (that of the bucket is spread over its
// tokens by their shares of it). -inf is a class without mass.
template <Divergence kind, class M, class Number = typename M::Number>
BBOPD_HOST_DEVICE BucketedRow<Number> bucketed(const Number* log_p, const Number* log_q, int classes, Number beta,
                                               Number skew, Number* grad) {
  using F = typename M::F;
  BucketedRow<Number> row;
  F kd{}, mean{};
  for (int c = 0; c < classes; c += M::kWidth) {
    const Class<F> both = class_of<kind, M>(M::load(log_p + c), M::load(log_q + c));
    const Term<F> t = term<kind, M>(both.p, both.q, both.d, F{} + beta, F{} + skew);
    row.floored += both.floored;
    kd += t.kd;
    mean += t.qh;
    M::store(grad + c, t.qh);
  }
  row.kd = M::sum(kd);
  if constexpr (has_mean(kind)) {
    const Number share = M::sum(mean);
    for (int c = 0; c < classes; c += M::kWidth)
      M::store(grad + c, M::load(grad + c) - M::exp(M::load(log_q + c)) * share);
  }
  return row;
}

}  // namespace bbopd::rows
