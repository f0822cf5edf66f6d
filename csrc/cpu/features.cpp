#include "cpu/features.h"

#include <cstdint>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace bbopd::cpu {

#if defined(__x86_64__)
namespace {

struct Registers {
  std::uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Registers query(std::uint32_t leaf, std::uint32_t subleaf = 0) {
  Registers r;
  if (__get_cpuid_max(leaf & 0x80000000U, nullptr) < leaf) return {};
  __cpuid_count(leaf, subleaf, r.eax, r.ebx, r.ecx, r.edx);
  return r;
}

bool has_bit(std::uint32_t word, int bit) { return ((word >> bit) & 1U) != 0; }

// XCR0: the register state that the operating system saves across a switch of tasks.
std::uint64_t saved_state() {
  std::uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<std::uint64_t>(high) << 32) | low;
}

// Linux hands out AMX tile data on request, once per process.
bool request_amx_permission() {
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureXtiledata = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtiledata) == 0;
}

}  // namespace

Features detect_features() {
  Features found;
  const Registers basic = query(1);
  constexpr int kOsxsave = 27, kFma = 12;
  if (!has_bit(basic.ecx, kOsxsave)) return found;

  const std::uint64_t saved = saved_state();
  constexpr std::uint64_t kAvxState = 0x6, kAvx512State = 0xE6, kAmxState = 0x60000;
  const Registers extended = query(7);
  const Registers extended1 = query(7, 1);

  const bool avx_state = (saved & kAvxState) == kAvxState;
  const bool avx512_state = (saved & kAvx512State) == kAvx512State;
  const bool amx_state = (saved & kAmxState) == kAmxState;

  constexpr int kAvx2 = 5, kAvx512f = 16, kAvx512dq = 17, kAvx512bw = 30, kAvx512vl = 31;
  constexpr int kAvx512Bf16 = 5, kAmxBf16 = 22, kAmxTile = 24;
  found.avx2 = avx_state && has_bit(extended.ebx, kAvx2) && has_bit(basic.ecx, kFma);
  found.avx512 = avx512_state && has_bit(extended.ebx, kAvx512f) && has_bit(extended.ebx, kAvx512dq) &&
                 has_bit(extended.ebx, kAvx512bw) && has_bit(extended.ebx, kAvx512vl);
  found.avx512_bf16 = found.avx512 && has_bit(extended1.eax, kAvx512Bf16);
  found.amx_bf16 =
      amx_state && has_bit(extended.edx, kAmxBf16) && has_bit(extended.edx, kAmxTile) && request_amx_permission();
  return found;
}
#else
Features detect_features() { return {}; }
#endif

}  // namespace bbopd::cpu
