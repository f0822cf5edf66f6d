#define BBOPD_ISA avx512
#define BBOPD_LANES 16
#include "cpu/isa.h"

namespace bbopd::cpu {

void distill_avx512(const DistillArguments& arguments) { avx512::distill<avx512::Float32>(arguments, {}); }
void logprobs_avx512(const LogprobsArguments& arguments) { avx512::logprobs<avx512::Float32>(arguments, {}); }
bool signal_rows_avx512(const SignalRows& rows) { return avx512::are_good(rows); }

}  // namespace bbopd::cpu
