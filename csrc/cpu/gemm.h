// Products of small tiles in cache. `Float32` multiplies in float32 with any instruction set; `Bfloat16` multiplies
// pairs of bfloat16 in AVX-512-BF16; `Tiles` leaves bfloat16 to torch's own AMX kernels. Each says how its right-hand
// side is laid out: in panels of kPanel columns, in each of which kGroup consecutive rows lie beside each other.
#pragma once

#include "cpu/arguments.h"
#include "cpu/simd.h"

namespace bbopd::cpu::BBOPD_ISA {

inline Index round_up(Index n, Index to) { return (n + to - 1) / to * to; }
inline Index smaller(Index a, Index b) { return a < b ? a : b; }
inline Index larger(Index a, Index b) { return a > b ? a : b; }

inline vf load_as_float(const Matrix& m, Index row, Index column) {
  const Index at = row * m.stride + column;
  if (m.type == Type::float32) return load(static_cast<const float*>(m.data) + at);
  const std::uint16_t* p = static_cast<const std::uint16_t*>(m.data) + at;
  return m.type == Type::bfloat16 ? from_bf16(p) : from_half(p);
}

// One number, through a vector of copies where it is half precision.
inline float one_as_float(const Matrix& m, Index row, Index column) {
  const Index at = row * m.stride + column;
  if (m.type == Type::float32) return static_cast<const float*>(m.data)[at];
  std::uint16_t copies[kLanes] = {};
  copies[0] = static_cast<const std::uint16_t*>(m.data)[at];
  return (m.type == Type::bfloat16 ? from_bf16(copies) : from_half(copies))[0];
}

// columns [first, first + count) of a row as float32; `to` has room for whole vectors, whose rest becomes 0.
inline void row_as_float(const Matrix& m, Index row, Index first, Index count, float* to) {
  Index c = 0;
  for (; c + kLanes <= count; c += kLanes) store(to + c, load_as_float(m, row, first + c));
  if (c < count) {
    store(to + c, vf{});
    for (; c < count; ++c) to[c] = one_as_float(m, row, first + c);
  }
}

// Asks for the numbers that a product will be added to, so that they are in cache when it is done.
template <int rows, int vectors>
inline void fetch(const float* c, Index ldc) {
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) __builtin_prefetch(c + r * ldc + v * kLanes, 1);
}

// ---------------------------------------------------------------- float32

struct Float32 {
  using T = float;
  static constexpr Type kType = Type::float32;
  static constexpr Index kVectors = 2, kPanel = kVectors * kLanes, kGroup = 1;
  static constexpr Index kRows = kLanes == 16 ? 12 : (kLanes == 8 ? 6 : 4);  // accumulators fill the registers
  static constexpr bool kRowMajorLeft = false;                               // the left side may have any strides

  template <int rows>
  static inline void block(Index depth, const float* a, Index row_stride, Index step, const float* b, float* c,
                           Index ldc, bool add) {
    if (add) fetch<rows, kVectors>(c, ldc);
    vf sum[rows][kVectors] = {};
    for (Index k = 0; k < depth; ++k) {
      vf right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * kPanel + v * kLanes);
      for (int r = 0; r < rows; ++r) {
        const float left = a[r * row_stride + k * step];
        for (int v = 0; v < kVectors; ++v) sum[r][v] += left * right[v];
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * ldc + v * kLanes;
        store(to, add ? load(to) + sum[r][v] : sum[r][v]);
      }
    }
  }

  template <int rows>
  static inline void last_block(Index left, Index depth, const float* a, Index row_stride, Index step, const float* b,
                                float* c, Index ldc, bool add) {
    if constexpr (rows > 0) {
      if (left == rows) {
        block<rows>(depth, a, row_stride, step, b, c, ldc, add);
      } else {
        last_block<rows - 1>(left, depth, a, row_stride, step, b, c, ldc, add);
      }
    }
  }

  // c [rows, columns] (+)= a [rows, depth] * b; element (i, k) of a is a[i * row_stride + k * step]
  static void multiply(const Products&, Index rows, Index columns, Index depth, const float* a, Index row_stride,
                       Index step, const float* b, float* c, Index ldc, bool add) {
    for (Index j = 0; j < columns; j += kPanel) {
      const float* panel = b + j * depth;
      Index i = 0;
      for (; i + kRows <= rows; i += kRows)
        block<kRows>(depth, a + i * row_stride, row_stride, step, panel, c + i * ldc + j, ldc, add);
      last_block<kRows - 1>(rows - i, depth, a + i * row_stride, row_stride, step, panel, c + i * ldc + j, ldc, add);
    }
  }
  static void release(const Products&) {}
};

// ---------------------------------------------------------------- bfloat16

#if defined(__AVX512BF16__)
struct Bfloat16Layout {
  using T = bf16;
  static constexpr Type kType = Type::bfloat16;
  static constexpr Index kGroup = 2;
  static constexpr bool kRowMajorLeft = true;  // pairs along the depth must lie together
};

struct Bfloat16 : Bfloat16Layout {
  static constexpr Index kVectors = 2, kPanel = kVectors * kLanes, kRows = 12;

  template <int rows>
  static inline void block(Index pairs, const bf16* a, Index row_stride, const bf16* b, float* c, Index ldc, bool add) {
    if (add) fetch<rows, kVectors>(c, ldc);
    __m512 sum[rows][kVectors];
    for (int r = 0; r < rows; ++r)
      for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_setzero_ps();
    for (Index k = 0; k < pairs; ++k) {
      __m512bh right[kVectors];
      for (int v = 0; v < kVectors; ++v) right[v] = (__m512bh)_mm512_loadu_si512(b + (k * kPanel + v * kLanes) * 2);
      for (int r = 0; r < rows; ++r) {
        int pair;
        std::memcpy(&pair, a + r * row_stride + 2 * k, sizeof pair);
        const __m512bh left = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < kVectors; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], left, right[v]);
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = c + r * ldc + v * kLanes;
        _mm512_storeu_ps(to, add ? _mm512_loadu_ps(to) + sum[r][v] : sum[r][v]);
      }
    }
  }

  template <int rows>
  static inline void last_block(Index left, Index pairs, const bf16* a, Index row_stride, const bf16* b, float* c,
                                Index ldc, bool add) {
    if constexpr (rows > 0) {
      if (left == rows) {
        block<rows>(pairs, a, row_stride, b, c, ldc, add);
      } else {
        last_block<rows - 1>(left, pairs, a, row_stride, b, c, ldc, add);
      }
    }
  }

  static void multiply(const Products&, Index rows, Index columns, Index depth, const bf16* a, Index row_stride, Index,
                       const bf16* b, float* c, Index ldc, bool add) {
    for (Index j = 0; j < columns; j += kPanel) {
      const bf16* panel = b + j * depth;
      Index i = 0;
      for (; i + kRows <= rows; i += kRows)
        block<kRows>(depth / 2, a + i * row_stride, row_stride, panel, c + i * ldc + j, ldc, add);
      last_block<kRows - 1>(rows - i, depth / 2, a + i * row_stride, row_stride, panel, c + i * ldc + j, ldc, add);
    }
  }
  static void release(const Products&) {}
};

struct Tiles : Bfloat16Layout {
  static constexpr Index kPanel = 64;

  static void multiply(const Products& torch, Index rows, Index columns, Index depth, const bf16* a, Index row_stride,
                       Index, const bf16* b, float* c, Index ldc, bool add) {
    for (Index j = 0; j < columns; j += kPanel)
      torch.multiply(rows, kPanel, depth, row_stride, kPanel, ldc, add, a, b + j * depth, c + j, true);
  }
  static void release(const Products& torch) { torch.release(true); }
};
#endif

// ---------------------------------------------------------------- laying out the right-hand side

// `to` gets the rows of a matrix in type T, `depth` numbers apart, zeros behind its columns and its last row.
template <class G>
void copy_rows(const Matrix& from, Index first, Index rows, Index padded_rows, Index depth, typename G::T* to) {
  for (Index r = 0; r < padded_rows; ++r) {
    typename G::T* row = to + r * depth;
    if (r >= rows) {
      std::memset(row, 0, static_cast<std::size_t>(depth) * sizeof *row);
      continue;
    }
    if (from.type == G::kType) {
      const auto* source = static_cast<const typename G::T*>(from.data) + (first + r) * from.stride;
      std::memcpy(row, source, static_cast<std::size_t>(from.columns) * sizeof *row);
    } else if constexpr (sizeof(typename G::T) == 4) {
      Index c = 0;
      for (; c + kLanes <= from.columns; c += kLanes) store(row + c, load_as_float(from, first + r, c));
      for (; c < from.columns; ++c) row[c] = one_as_float(from, first + r, c);
    }
    for (Index c = from.columns; c < depth; ++c) row[c] = 0;
  }
}

// The right-hand side whose column j is row j of `from` [columns, depth]: the weight, in a product of hidden states and
// weight.T. `columns` is a multiple of kPanel and `depth` of kGroup; the numbers are read as 32-bit words, so that a
// group moves as one.
template <class G>
void pack_transposed(const typename G::T* from, Index stride, Index columns, Index depth, typename G::T* to) {
  const Index words = depth / G::kGroup;
  for (Index j = 0; j < columns; j += kLanes) {
    typename G::T* panel = to + j / G::kPanel * G::kPanel * depth + j % G::kPanel * G::kGroup;
    Index w = 0;
    for (; w + kLanes <= words; w += kLanes) {
      vu square[kLanes];
      for (int i = 0; i < kLanes; ++i) std::memcpy(&square[i], from + (j + i) * stride + w * G::kGroup, sizeof(vu));
      transpose(square);
      for (int i = 0; i < kLanes; ++i) std::memcpy(panel + (w + i) * G::kPanel * G::kGroup, &square[i], sizeof(vu));
    }
    for (; w < words; ++w)
      for (int i = 0; i < kLanes; ++i)
        std::memcpy(panel + w * G::kPanel * G::kGroup + i * G::kGroup, from + (j + i) * stride + w * G::kGroup, 4);
  }
}

// The right-hand side `from` itself: [depth, columns], depth a multiple of kGroup and columns of kPanel.
template <class G>
void pack(const typename G::T* from, Index stride, Index depth, Index columns, typename G::T* to) {
  for (Index j = 0; j < columns; j += G::kPanel) {
    typename G::T* panel = to + j * depth;
    for (Index k = 0; k < depth; k += G::kGroup) {
      const typename G::T* row = from + k * stride + j;
      if constexpr (G::kGroup == 1) {
        std::memcpy(panel + k * G::kPanel, row, G::kPanel * sizeof *row);
      } else {
        const typename G::T* next = row + stride;
        for (Index c = 0; c < G::kPanel; c += kLanes) {
          vh low, high;
          std::memcpy(&low, row + c, sizeof low);
          std::memcpy(&high, next + c, sizeof high);
          const vu pairs = __builtin_convertvector(low, vu) | (__builtin_convertvector(high, vu) << 16);
          std::memcpy(panel + (k / 2 * G::kPanel + c) * 2, &pairs, sizeof pairs);
        }
      }
    }
  }
}

}  // namespace bbopd::cpu::BBOPD_ISA
