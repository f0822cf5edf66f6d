// What happens to one row of a tile: statistics on the way to the softmax, then its gradient, in place.
#pragma once

#include "cpu/simd.h"

namespace bbopd::cpu::BBOPD_ISA {

using rows::Divergence;

// How exp(z) is had beside exp(z / T): the same where T = 1, its square where T = 2, by another exponential elsewhere.
struct Temper {
  float inverse;
  enum Power { same, square, other } power;
  explicit Temper(float temperature)
      : inverse(1.0F / temperature), power(temperature == 1.0F ? same : (temperature == 2.0F ? square : other)) {}
};

// A slot's statistics of one token, by lane: sums of exp((z - max) / T) and of exp(z - max).
struct Sums {
  vf tempered, plain;
  float max;
};

// Adds a row of logits; `needs_plain` where T is not 1 and a label asks for it.
template <Temper::Power power>
inline void add_row_at(const float* z, int n, float inverse, bool needs_plain, Sums& sums) {
  vf top = load(z);
  for (int c = kLanes; c < n; c += kLanes) top = maximum(load(z + c), top);
  if (any(top > sums.max)) {
    const float max = max_lane(maximum(top, fill(sums.max)));
    sums.tempered *= __builtin_expf((sums.max - max) * inverse);
    sums.plain *= __builtin_expf(sums.max - max);
    sums.max = max;
  }
  const float shift = sums.max == -__builtin_inff() ? 0.0F : sums.max;
  vf tempered{}, plain{};
  for (int c = 0; c < n; c += kLanes) {
    const vf above = load(z + c) - shift;
    const vf e = exponential(power == Temper::same ? above : above * inverse);
    tempered += e;
    if constexpr (power == Temper::square) plain += e * e;
    if constexpr (power == Temper::other)
      if (needs_plain) plain += exponential(above);
  }
  sums.tempered += tempered;
  sums.plain += plain;
}

inline void add_row(const float* z, int n, const Temper& temper, bool needs_plain, Sums& sums) {
  if (temper.power == Temper::same) return add_row_at<Temper::same>(z, n, temper.inverse, needs_plain, sums);
  if (temper.power == Temper::square) return add_row_at<Temper::square>(z, n, temper.inverse, needs_plain, sums);
  return add_row_at<Temper::other>(z, n, temper.inverse, needs_plain, sums);
}

// What the gradient of a row needs of its token. Outside the ids of a support it is tempered * exp((z - max) / T) +
// plain * exp(z - max).
struct Row {
  float max = 0.0F, tempered = 0.0F, plain = 0.0F;
  // full: log q = (z - max) / T - log_sum, and so the teacher's; the sum of q h, the terms' weights, and the factor
  // from q, q^2 or exp(z - max) to cross-entropy's gradient
  float log_sum = 0.0F, teacher_max = 0.0F, teacher_log_sum = 0.0F, mean = 0.0F, kd_grad = 0.0F, ce_grad = 0.0F,
        plain_scale = 0.0F;
};

// The softcap's slope at logits z, dz/d(what was capped).
inline vf slope(vf z, float inverse_cap) {
  const vf t = z * inverse_cap;
  return 1.0F - t * t;
}

template <Temper::Power power, bool is_capped>
inline void sparse_gradient_at(float* z, int n, float inverse, const Row& row, float inverse_cap) {
  const float max = row.max, tempered = row.tempered, plain = row.plain;  // the compiler must not fear that z is one
  for (int c = 0; c < n; c += kLanes) {
    const vf logit = load(z + c), above = logit - max;
    const vf e = exponential(power == Temper::same ? above : above * inverse);
    vf g;
    if constexpr (power == Temper::same) {
      g = e * (tempered + plain);
    } else if constexpr (power == Temper::square) {
      g = e * (e * plain + tempered);
    } else {
      g = e * tempered;
      if (plain != 0.0F) g += exponential(above) * plain;
    }
    // a masked logit has no slope to speak of, and no gradient
    if constexpr (is_capped) g *= slope(logit, inverse_cap);
    store(z + c, g);
  }
}

template <bool is_capped>
inline void sparse_gradient_with(float* z, int n, const Temper& temper, const Row& row, float inverse_cap) {
  if (temper.power == Temper::same)
    return sparse_gradient_at<Temper::same, is_capped>(z, n, temper.inverse, row, inverse_cap);
  if (temper.power == Temper::square)
    return sparse_gradient_at<Temper::square, is_capped>(z, n, temper.inverse, row, inverse_cap);
  return sparse_gradient_at<Temper::other, is_capped>(z, n, temper.inverse, row, inverse_cap);
}

inline void sparse_gradient(float* z, int n, const Temper& temper, const Row& row, float inverse_cap) {
  if (inverse_cap != 0.0F) return sparse_gradient_with<true>(z, n, temper, row, inverse_cap);
  sparse_gradient_with<false>(z, n, temper, row, inverse_cap);
}

struct DenseSums {
  float kd = 0.0F, mean = 0.0F;
  int floored = 0;
};

// Full distributions: the sums of a row, and where `gradient` asks for it the gradient in place of z.
template <Divergence kind, bool gradient>
inline DenseSums dense_row(float* z, const float* t, int n, const Temper& temper, const Row& row, float beta,
                           float skew, float inverse_cap) {
  vf kd{}, mean{}, below{};
  const float offset = row.log_sum - row.teacher_log_sum;
  for (int c = 0; c < n; c += kLanes) {
    const vf logit = load(z + c), raw = load(t + c);
    const vf teacher = minimum(maximum(raw, fill(rows::kLowest)), fill(rows::kInfinityStandIn));
    const vf student = maximum(logit, fill(rows::kLowest));
    // from each side's own maximum, so that what matters most is rounded least
    const vf below_max = student - row.max, teacher_below_max = teacher - row.teacher_max;
    const vf log_q = below_max * temper.inverse - row.log_sum,
             log_p = teacher_below_max * temper.inverse - row.teacher_log_sum;
    const vf q = exponential(log_q), p = exponential(log_p);
    vf d = (teacher_below_max - below_max) * temper.inverse + offset;
    if constexpr (kind == Divergence::reverse_kl) {
      below += ((log_p < rows::kLogPFloor) & (logit > -__builtin_inff())) ? vf{} + 1.0F : vf{};
      d = rows::floored<Vector>(d, log_q);
    }
    const rows::Term<vf> term = rows::term<kind, Vector>(p, q, d, fill(beta), fill(skew));
    kd += term.kd;
    if constexpr (rows::has_mean(kind)) mean += term.qh;
    if constexpr (gradient) {
      vf g = rows::has_mean(kind) ? term.qh - q * row.mean : term.qh;
      g *= row.kd_grad;
      if (row.ce_grad != 0.0F) {
        const vf plain =
            temper.power == Temper::same ? q : (temper.power == Temper::square ? q * q : exponential(logit - row.max));
        g += plain * row.plain_scale;
      }
      if (inverse_cap != 0.0F) g *= slope(logit, inverse_cap);
      store(z + c, g);
    }
  }
  return {sum_lanes(kd), sum_lanes(mean), static_cast<int>(sum_lanes(below))};
}

// ---------------------------------------------------------------- logits kept from the first pass to the next

// As half precision: z less a centre, or z less the teacher's logit and a centre where that is known, so that two
// distributions that nearly agree differ by what is kept and not by what was rounded away.
inline vf base(const float* t, int c) {
  if (t == nullptr) return vf{};
  const vf teacher = load(t + c);
  return absolute(teacher) < 1e4F ? teacher : vf{};
}

inline float keep_row(const float* z, const float* t, int n, std::uint16_t* kept) {
  float centre;
  if (t == nullptr) {
    vf top = load(z);
    for (int c = kLanes; c < n; c += kLanes) top = maximum(load(z + c), top);
    centre = max_lane(top);
  } else {
    centre = z[0] - base(t, 0)[0];
  }
  if (!(__builtin_fabsf(centre) < __builtin_inff())) centre = 0.0F;
  for (int c = 0; c < n; c += kLanes) to_half(kept + c, (load(z + c) - base(t, c)) - centre);
  return centre;
}

inline void restore_row(const std::uint16_t* kept, const float* t, int n, float centre, float* z) {
  for (int c = 0; c < n; c += kLanes) store(z + c, (from_half(kept + c) + centre) + base(t, c));
}

}  // namespace bbopd::cpu::BBOPD_ISA
