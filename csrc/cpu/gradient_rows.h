// Gradients in other shapes: those of the logits as left-hand sides of products, those of the inputs as rows of a
// tensor.
#pragma once

#include "cpu/gemm.h"

namespace bbopd::cpu::BBOPD_ISA {

// Rounds gradients of logits [rows, block] to bfloat16, by tokens and by vocabulary entries; tokens from `rows` to
// `depth` are 0.
inline void round_rows(const float* from, Index rows, Index depth, Index block, bf16* by_token, bf16* by_entry) {
  for (Index n = 0; n < depth; n += 2 * kLanes) {
    for (Index r = n; r < n + 2 * kLanes; ++r)
      for (Index c = 0; c < block; c += kLanes)
        to_bf16(by_token + r * block + c, r < rows ? load(from + r * block + c) : vf{});
    for (Index c = 0; c < block; c += kLanes) {
      vu square[kLanes];
      for (Index i = 0; i < kLanes; ++i) {
        vh even, odd;
        std::memcpy(&even, by_token + (n + 2 * i) * block + c, sizeof even);
        std::memcpy(&odd, by_token + (n + 2 * i + 1) * block + c, sizeof odd);
        square[i] = __builtin_convertvector(even, vu) | (__builtin_convertvector(odd, vu) << 16);
      }
      transpose(square);
      for (Index i = 0; i < kLanes; ++i) std::memcpy(by_entry + (c + i) * depth + n, &square[i], sizeof(vu));
    }
  }
}

// Writes `count` numbers at `at`; whole vectors of `from` can be read.
inline void write_row(const float* from, Index count, void* to, Index at, Type type) {
  if (type == Type::float32) {
    std::memcpy(static_cast<float*>(to) + at, from, static_cast<std::size_t>(count) * sizeof(float));
    return;
  }
  std::uint16_t* const out = static_cast<std::uint16_t*>(to) + at;
  Index c = 0;
  for (; c + kLanes <= count; c += kLanes) to_bf16(out + c, load(from + c));
  if (c < count) {
    std::uint16_t rest[kLanes];
    to_bf16(rest, load(from + c));
    std::memcpy(out + c, rest, static_cast<std::size_t>(count - c) * sizeof *rest);
  }
}

}  // namespace bbopd::cpu::BBOPD_ISA
