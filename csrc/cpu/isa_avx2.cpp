#define BBOPD_ISA avx2
#define BBOPD_LANES 8
#include "cpu/isa.h"

namespace bbopd::cpu {

void distill_avx2(const DistillArguments& arguments) { avx2::distill<avx2::Float32>(arguments, {}); }
void logprobs_avx2(const LogprobsArguments& arguments) { avx2::logprobs<avx2::Float32>(arguments, {}); }
bool signal_rows_avx2(const SignalRows& rows) { return avx2::are_good(rows); }

}  // namespace bbopd::cpu
