// Rows of numbers in memory, read and written four at a time: at once where they are aligned, one by one elsewhere.
#pragma once

#include <cstdint>
#include <cstring>

#include "cuda/block.h"

namespace bbopd::cuda {

using Index = std::int64_t;

enum class Type : int { float32, bfloat16, float16 };

template <class Number>
struct alignas(4 * sizeof(Number)) Four {
  Number at[4];
};

// Rows of `width` readable numbers, each contiguous, `stride` numbers apart.
struct Matrix {
  void* data;
  Index stride;
  int width;
  Type type;
};

inline bool is_aligned(const Matrix& matrix) {
  const Index size = matrix.type == Type::float32 ? 4 : 2;
  return (reinterpret_cast<std::uintptr_t>(matrix.data) | static_cast<std::uintptr_t>(matrix.stride * size)) %
             static_cast<std::uintptr_t>(4 * size) ==
         0;
}

BBOPD_IN_BLOCK float from_bits(std::uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
BBOPD_IN_BLOCK std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

BBOPD_IN_BLOCK float widen_bfloat16(std::uint16_t x) { return from_bits(static_cast<std::uint32_t>(x) << 16); }

BBOPD_IN_BLOCK float widen_float16(std::uint16_t x) {
  const std::uint32_t sign = (x & 0x8000U) << 16, rest = x & 0x7fffU;
  // subnormal: an integer times 2^-24; infinity and NaN keep their fraction; normal: shifted, with another bias
  if (rest < 0x400U) return from_bits(sign | bits_of(static_cast<float>(rest) * 5.9604644775390625e-8F));
  return from_bits(sign | ((rest << 13) + (rest >= 0x7c00U ? 0x70000000U : 0x38000000U)));
}

// To nearest, ties to even; NaN stays NaN.
BBOPD_IN_BLOCK std::uint16_t to_bfloat16(float x) {
  const std::uint32_t bits = bits_of(x);
  if (x != x) return 0x7fc0U;
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

template <class Number, class Widen>
BBOPD_IN_BLOCK void read_as(const Number* row, int column, int end, bool at_once, Widen widen, float (&z)[4]) {
  if (at_once) {
    const Four<Number> four = *reinterpret_cast<const Four<Number>*>(row + column);
    for (int i = 0; i < 4; ++i) z[i] = widen(four.at[i]);
  } else {
    for (int i = 0; i < 4; ++i)
      if (column + i < end) z[i] = widen(row[column + i]);
  }
}

// Four logits of a row from `column` on, -inf from `end` on.
BBOPD_IN_BLOCK void read(const Matrix& matrix, bool aligned, Index row, int column, int end, float (&z)[4]) {
  const bool at_once = aligned && column + 4 <= matrix.width;
  const Index first = row * matrix.stride;
  if (matrix.type == Type::float32) {
    read_as(static_cast<const float*>(matrix.data) + first, column, end, at_once, [](float x) { return x; }, z);
  } else if (matrix.type == Type::bfloat16) {
    const auto* numbers = static_cast<const std::uint16_t*>(matrix.data) + first;
    read_as(numbers, column, end, at_once, [](std::uint16_t x) { return widen_bfloat16(x); }, z);
  } else {
    const auto* numbers = static_cast<const std::uint16_t*>(matrix.data) + first;
    read_as(numbers, column, end, at_once, [](std::uint16_t x) { return widen_float16(x); }, z);
  }
  for (int i = 0; i < 4; ++i)
    if (column + i >= end) z[i] = -__builtin_inff();
}

template <class Number, class Round>
BBOPD_IN_BLOCK void write_as(Number* row, int column, int end, bool at_once, Round round, const float (&z)[4]) {
  if (at_once) {
    Four<Number> four;
    for (int i = 0; i < 4; ++i) four.at[i] = round(z[i]);
    *reinterpret_cast<Four<Number>*>(row + column) = four;
  } else {
    for (int i = 0; i < 4; ++i)
      if (column + i < end) row[column + i] = round(z[i]);
  }
}

// Four numbers of a row, in float32 or rounded to bfloat16.
BBOPD_IN_BLOCK void write(const Matrix& matrix, bool aligned, Index row, int column, int end, const float (&z)[4]) {
  const bool at_once = aligned && column + 4 <= matrix.width;
  const Index first = row * matrix.stride;
  if (matrix.type == Type::float32) {
    write_as(static_cast<float*>(matrix.data) + first, column, end, at_once, [](float x) { return x; }, z);
  } else {
    auto* numbers = static_cast<std::uint16_t*>(matrix.data) + first;
    write_as(numbers, column, end, at_once, [](float x) { return to_bfloat16(x); }, z);
  }
}

}  // namespace bbopd::cuda
