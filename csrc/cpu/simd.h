// Vectors of `kLanes` floats for the instruction set that this file is compiled for, and the functions of them that the
// kernels need. Included by isa_*.cpp alone, which sets BBOPD_ISA (a namespace, so that no symbol of one instruction
// set is linked in another's place) and BBOPD_LANES.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "row_math.h"

namespace bbopd::cpu::BBOPD_ISA {

constexpr int kLanes = BBOPD_LANES;
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t vh __attribute__((vector_size(kLanes * 2)));

inline vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
inline vf fill(float x) { return x - vf{}; }

inline vf maximum(vf a, vf b) { return a > b ? a : b; }  // b where either is NaN
inline vf minimum(vf a, vf b) { return a < b ? a : b; }
inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

inline bool any(vi mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps((__m256)mask) != 0;
#else
  std::int32_t found = 0;
  for (int i = 0; i < kLanes; ++i) found |= mask[i];
  return found != 0;
#endif
}

// The lanes where the mask is set, as bits.
inline std::uint32_t lanes_of(vi mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask((__m512i)mask);
#elif defined(__AVX2__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (static_cast<std::uint32_t>(mask[i]) & 1U) << i;
  return bits;
#endif
}

inline float max_lane(vf v) {
  float best = v[0];
  for (int i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
// By halves, always in the same order.
inline float sum_lanes(vf v) {
  float part[kLanes];
  store(part, v);
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) part[i] += part[i + half];
  return part[0];
}

// ---------------------------------------------------------------- exponentials and logarithms

// exp(x) - 1 = scale * (e^r - 1) + (scale - 1), with x = k ln 2 + r and scale = 2^k.
struct Reduced {
  vf scale, em1_r;
};

inline Reduced reduce(vf x) {
  constexpr float kLog2e = 1.44269504F, kLn2High = 0.693359375F, kLn2Low = -2.12194440e-4F, kRound = 12582912.0F;
  vf k = x * kLog2e + kRound;
  const vi bits = (vi)k;
  k -= kRound;
  const vf r = (x - k * kLn2High) - k * kLn2Low;
  // e^r - 1 = r + r^2 p(r) on |r| <= ln2 / 2 (minimax, relative error 2^-26)
  vf p = r * 1.9875691500e-4F + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  return {(vf)((bits << 23) + 0x3f800000), p * (r * r) + r};
}

// Within 2 units in the last place. Below -87.3 it is 0; above 88 it stops growing. NaN stays NaN.
inline vf exponential(vf x) {
  const Reduced e = reduce(x < -87.3F ? fill(-87.3F) : (x > 88.0F ? fill(88.0F) : x));
  return x < -87.3F ? vf{} : e.scale * e.em1_r + e.scale;
}

// exp(x) - 1, relative to itself as exact as that.
inline vf exponential_minus_1(vf x) {
  const Reduced e = reduce(x < -87.3F ? fill(-87.3F) : (x > 88.0F ? fill(88.0F) : x));
  return e.scale * e.em1_r + (e.scale - 1.0F);
}

// log(1 + x) for x > -1, relative to itself within a few units in the last place.
inline vf logarithm_of_1_plus(vf x) {
  const vf u = x + 1.0F;
  // u = 2^k m, m in [sqrt(1/2), sqrt(2))
  const vi bits = (vi)u - 0x3f3504f3;
  const vi k = bits >> 23;
  const vf m = (vf)((vi)u - (k << 23));
  const vf f = m - 1.0F;
  const vf square = f * f;
  vf p = f * 7.0376836292e-2F - 1.1514610310e-1F;
  p = p * f + 1.1676998740e-1F;
  p = p * f - 1.2420140846e-1F;
  p = p * f + 1.4249322787e-1F;
  p = p * f - 1.6668057665e-1F;
  p = p * f + 2.0000714765e-1F;
  p = p * f - 2.4999993993e-1F;
  p = p * f + 3.3333331174e-1F;
  const vf kf = __builtin_convertvector(k, vf);
  vf log_u = p * f * square + kf * -2.12194440e-4F;
  log_u = (log_u - 0.5F * square) + f + kf * 0.693359375F;
  return log_u + (x - (u - 1.0F)) / u;  // what rounding 1 + x left out
}

// tanh, with a relative error of rounding near 0 as well.
inline vf hyperbolic_tangent(vf x) {
  const vf e = exponential_minus_1(-2.0F * absolute(x));
  const vf t = -e / (e + 2.0F);
  return x < 0.0F ? -t : t;
}

// The arithmetic policy of row_math.h.
struct Vector {
  using F = vf;
  using Number = float;
  static constexpr int kWidth = kLanes;
  static inline vf load(const float* from) { return BBOPD_ISA::load(from); }
  static inline void store(float* to, vf x) { BBOPD_ISA::store(to, x); }
  static inline float sum(vf x) { return sum_lanes(x); }
  static inline int count(vi mask) { return __builtin_popcount(lanes_of(mask)); }
  static inline vf exp(vf x) { return exponential(x); }
  static inline vf expm1(vf x) { return exponential_minus_1(x); }
  static inline vf log1p(vf x) { return logarithm_of_1_plus(x); }
  static inline vf maximum(vf a, vf b) { return a > b ? a : b; }
  static inline vf minimum(vf a, vf b) { return a < b ? a : b; }
  static inline vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
  static inline vf negate_where_negative(vf value, vf sign) { return (vf)((vi)value ^ ((vi)sign & (vi)fill(-0.0F))); }
};

// ---------------------------------------------------------------- bfloat16 and half precision

using bf16 = std::uint16_t;

inline vf from_bf16(const std::uint16_t* p) {
  vh v;
  std::memcpy(&v, p, sizeof v);
  return (vf)(__builtin_convertvector(v, vu) << 16);
}

// To nearest, ties to even; NaN stays NaN.
inline void to_bf16(std::uint16_t* p, vf x) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(p, &rounded, sizeof rounded);
#else
  const vu bits = (vu)x;
  const vu rounded = (bits + (0x7fffU + ((bits >> 16) & 1U))) >> 16;
  const vh v = __builtin_convertvector(x == x ? rounded : vu{} + 0x7fc0U, vh);
  std::memcpy(p, &v, sizeof v);
#endif
}

inline vf from_half(const std::uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vh v;
  std::memcpy(&v, p, sizeof v);
  const vu h = __builtin_convertvector(v, vu);
  const vu sign = (h & 0x8000U) << 16, rest = h & 0x7fffU;
  // normal numbers: shift and rebias; subnormal ones: as an integer times 2^-24; infinity and NaN keep their fraction
  const vf small = __builtin_convertvector((vi)rest, vf) * 5.9604644775390625e-8F;
  const vu large = (rest << 13) + (rest >= 0x7c00U ? vu{} + 0x70000000U : vu{} + 0x38000000U);
  return (vf)((rest < 0x400U ? (vu)small : large) | sign);
#endif
}

// To nearest; beyond 65504 it saturates, infinity stays.
inline void to_half(std::uint16_t* p, vf x) {
  const vf limited = absolute(x) < __builtin_inff() ? minimum(maximum(x, fill(-65504.0F)), fill(65504.0F)) : x;
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)limited, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)limited, _MM_FROUND_TO_NEAREST_INT));
#else
  const vu bits = (vu)limited, sign = (bits >> 16) & 0x8000U, rest = bits & 0x7fffffffU;
  const vu normal = (rest + 0xfffU + ((rest >> 13) & 1U) - 0x38000000U) >> 13;
  const vu small = (vu)((vi)(((vf)rest) * 16777216.0F + 12582912.0F) & 0x3fffff);
  const vu special = rest > 0x7f800000U ? vu{} + 0x7e00U : vu{} + 0x7c00U;
  const vh v =
      __builtin_convertvector((rest >= 0x7f800000U ? special : (rest < 0x38800000U ? small : normal)) | sign, vh);
  std::memcpy(p, &v, sizeof v);
#endif
}

// ---------------------------------------------------------------- transposing

// A square of 32-bit words, kLanes by kLanes, in place: off-diagonal blocks change places, halves first.
template <int half = kLanes / 2>
inline void transpose(vu* rows) {
  if constexpr (half > 0) {
    vu take_first, take_second;
    for (int i = 0; i < kLanes; ++i) {
      const bool low = (i & half) == 0;
      take_first[i] = static_cast<std::uint32_t>(low ? i : kLanes + i - half);
      take_second[i] = static_cast<std::uint32_t>(low ? i + half : kLanes + i);
    }
    for (int i = 0; i < kLanes; ++i) {
      if ((i & half) != 0) continue;
      const vu a = rows[i], b = rows[i + half];
      rows[i] = __builtin_shuffle(a, b, take_first);
      rows[i + half] = __builtin_shuffle(a, b, take_second);
    }
    transpose<half / 2>(rows);
  }
}

}  // namespace bbopd::cpu::BBOPD_ISA
