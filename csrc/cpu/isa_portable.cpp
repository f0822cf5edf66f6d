#define BBOPD_ISA portable
#define BBOPD_LANES 4
#include "cpu/isa.h"

namespace bbopd::cpu {

void distill_portable(const DistillArguments& arguments) { portable::distill<portable::Float32>(arguments, {}); }
void logprobs_portable(const LogprobsArguments& arguments) { portable::logprobs<portable::Float32>(arguments, {}); }
bool signal_rows_portable(const SignalRows& rows) { return portable::are_good(rows); }

}  // namespace bbopd::cpu
