#define BBOPD_ISA avx512_bf16
#define BBOPD_LANES 16
#include "cpu/isa.h"

namespace bbopd::cpu {

void distill_avx512_bf16(const DistillArguments& arguments) {
  avx512_bf16::distill<avx512_bf16::Bfloat16>(arguments, {});
}

void distill_amx_bf16(const DistillArguments& arguments, const Products& products) {
  avx512_bf16::distill<avx512_bf16::Tiles>(arguments, products);
}

void logprobs_avx512_bf16(const LogprobsArguments& arguments) {
  avx512_bf16::logprobs<avx512_bf16::Bfloat16>(arguments, {});
}

void logprobs_amx_bf16(const LogprobsArguments& arguments, const Products& products) {
  avx512_bf16::logprobs<avx512_bf16::Tiles>(arguments, products);
}

}  // namespace bbopd::cpu
