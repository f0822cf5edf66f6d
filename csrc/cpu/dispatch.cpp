#include "cpu/dispatch.h"

#include <dlfcn.h>

#include <stdexcept>

#include "cpu/features.h"

namespace bbopd::cpu {
namespace {

// at::native::cpublas::brgemm for bfloat16, an exported symbol of libtorch_cpu; it aborts without AVX-512-BF16, which
// amx_bf16 implies.
Products torch_products() {
  Products found;
  void* const torch = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
  void* const where = torch == nullptr ? RTLD_DEFAULT : torch;
  found.multiply =
      reinterpret_cast<Brgemm>(dlsym(where, "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"));
  found.release = reinterpret_cast<BrgemmRelease>(dlsym(where, "_ZN2at6native7cpublas14brgemm_releaseEb"));
  return found;
}

const Products& products() {
  static const Products found = torch_products();
  return found;
}

}  // namespace

Level best_level() {
  static const Features features = detect_features();
  if (features.amx_bf16 && features.avx512_bf16 && products().multiply != nullptr && products().release != nullptr)
    return Level::amx_bf16;
  if (features.avx512_bf16) return Level::avx512_bf16;
  if (features.avx512) return Level::avx512;
  return features.avx2 ? Level::avx2 : Level::portable;
}

namespace {

struct Kernels {
  void (*distill)(const DistillArguments&);
  void (*logprobs)(const LogprobsArguments&);
};

Kernels kernels_of(Level level) {
  if (level > best_level())
    throw std::invalid_argument("this machine does not have the instruction set that was asked for");
  switch (level) {
#if defined(__x86_64__)
    case Level::amx_bf16:
      return {[](const DistillArguments& arguments) { distill_amx_bf16(arguments, products()); },
              [](const LogprobsArguments& arguments) { logprobs_amx_bf16(arguments, products()); }};
    case Level::avx512_bf16:
      return {distill_avx512_bf16, logprobs_avx512_bf16};
    case Level::avx512:
      return {distill_avx512, logprobs_avx512};
    case Level::avx2:
      return {distill_avx2, logprobs_avx2};
#endif
    default:
      return {distill_portable, logprobs_portable};
  }
}

}  // namespace

void distill(const DistillArguments& arguments, Level level) { kernels_of(level).distill(arguments); }

void logprobs(const LogprobsArguments& arguments, Level level) { kernels_of(level).logprobs(arguments); }

bool signal_rows(const SignalRows& rows, Level level) {
#if defined(__x86_64__)
  // not best_level(): it looks for torch, which need not be loaded here, and remembers what it found
  static const Features features = detect_features();
  if (level >= Level::avx512 && features.avx512) return signal_rows_avx512(rows);
  if (level >= Level::avx2 && features.avx2) return signal_rows_avx2(rows);
#endif
  (void)level;
  return signal_rows_portable(rows);
}

}  // namespace bbopd::cpu
