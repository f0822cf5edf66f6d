#include "cpu/crc32.h"

#include <array>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace bbopd::cpu {
namespace {

constexpr std::uint32_t kPolynomial = 0xedb88320U;  // bits reflected
constexpr std::size_t kStep = 8;

// Entry [n][b]: the remainder of byte b followed by n zero bytes.
using Tables = std::array<std::array<std::uint32_t, 256>, kStep>;

constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t rest = byte;
    for (int bit = 0; bit < 8; ++bit) rest = (rest >> 1) ^ ((rest & 1U) != 0 ? kPolynomial : 0U);
    tables[0][byte] = rest;
  }
  for (std::size_t n = 1; n < kStep; ++n)
    for (std::size_t byte = 0; byte < 256; ++byte)
      tables[n][byte] = (tables[n - 1][byte] >> 8) ^ tables[0][tables[n - 1][byte] & 0xffU];
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint32_t by_tables(const std::uint8_t* data, std::size_t size, std::uint32_t rest) {
  for (; size >= kStep; data += kStep, size -= kStep) {
    std::uint32_t next = 0;
    for (std::size_t i = 0; i < kStep; ++i)
      next ^= kTables[kStep - 1 - i][data[i] ^ (i < 4 ? (rest >> (8 * i)) & 0xffU : 0U)];
    rest = next;
  }
  for (; size > 0; ++data, --size) rest = (rest >> 8) ^ kTables[0][(rest ^ *data) & 0xffU];
  return rest;
}

#if defined(__x86_64__)

// Gopal et al., "Fast CRC Computation for Generic Polynomials Using PCLMULQDQ Instruction", Intel 2009: 64 bytes at a
// time are folded onto the next 64. `size` is a multiple of 16 and at least 64.
__attribute__((target("pclmul,sse4.1"))) std::uint32_t by_folding(const std::uint8_t* data, std::size_t size,
                                                                  std::uint32_t rest) {
  const auto load = [](const std::uint8_t* from) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  };
  const auto fold = [](__m128i x, __m128i by, __m128i onto) __attribute__((target("pclmul,sse4.1"))) {
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(x, by, 0x00), _mm_clmulepi64_si128(x, by, 0x11)), onto);
  };
  // powers of x modulo the polynomial, reflected: over 512 bits, over 128, and to 64
  const __m128i by_512 = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4);
  const __m128i by_128 = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
  const __m128i by_64 = _mm_set_epi64x(0, 0x0163cd6124);
  const __m128i barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
  const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);

  __m128i x0 = _mm_xor_si128(load(data), _mm_cvtsi32_si128(static_cast<int>(rest)));
  __m128i x1 = load(data + 16), x2 = load(data + 32), x3 = load(data + 48);
  for (data += 64, size -= 64; size >= 64; data += 64, size -= 64) {
    x0 = fold(x0, by_512, load(data));
    x1 = fold(x1, by_512, load(data + 16));
    x2 = fold(x2, by_512, load(data + 32));
    x3 = fold(x3, by_512, load(data + 48));
  }
  __m128i x = fold(fold(fold(x0, by_128, x1), by_128, x2), by_128, x3);
  for (; size >= 16; data += 16, size -= 16) x = fold(x, by_128, load(data));

  x = _mm_xor_si128(_mm_srli_si128(x, 8), _mm_clmulepi64_si128(x, by_128, 0x10));
  x = _mm_xor_si128(_mm_srli_si128(x, 4), _mm_clmulepi64_si128(_mm_and_si128(x, low), by_64, 0x00));
  __m128i quotient = _mm_clmulepi64_si128(_mm_and_si128(x, low), barrett, 0x10);
  quotient = _mm_clmulepi64_si128(_mm_and_si128(quotient, low), barrett, 0x00);
  return static_cast<std::uint32_t>(_mm_extract_epi32(_mm_xor_si128(x, quotient), 1));
}

#endif

}  // namespace

std::uint32_t crc32(const std::uint8_t* data, std::size_t size, std::uint32_t start) {
  std::uint32_t rest = ~start;
#if defined(__x86_64__)
  static const bool can_fold = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
  if (can_fold && size >= 64) {
    const std::size_t folded = size / 16 * 16;
    rest = by_folding(data, folded, rest);
    data += folded;
    size -= folded;
  }
#endif
  return ~by_tables(data, size, rest);
}

}  // namespace bbopd::cpu
