// Picks the kernels of the best instruction set that this machine has, under a ceiling that may be set.
#pragma once

#include "cpu/arguments.h"

namespace bbopd::cpu {

enum class Level : int { portable, avx2, avx512, avx512_bf16, amx_bf16 };

// The best that the processor, the operating system and, for amx_bf16, the loaded torch allow.
Level best_level();

// Throws std::invalid_argument where this machine cannot run `level`.
void distill(const DistillArguments& arguments, Level level);
void logprobs(const LogprobsArguments& arguments, Level level);

// Whether rows are what they must be, and were copied. False does not say what is wrong, nor quite that anything is:
// whoever asks has to look again, more slowly. Takes the best of avx512, avx2 and portable up to `level`.
bool signal_rows(const SignalRows& rows, Level level);

void distill_portable(const DistillArguments&);
void distill_avx2(const DistillArguments&);
void distill_avx512(const DistillArguments&);
void distill_avx512_bf16(const DistillArguments&);
void distill_amx_bf16(const DistillArguments&, const Products&);

void logprobs_portable(const LogprobsArguments&);
void logprobs_avx2(const LogprobsArguments&);
void logprobs_avx512(const LogprobsArguments&);
void logprobs_avx512_bf16(const LogprobsArguments&);
void logprobs_amx_bf16(const LogprobsArguments&, const Products&);

bool signal_rows_portable(const SignalRows&);
bool signal_rows_avx2(const SignalRows&);
bool signal_rows_avx512(const SignalRows&);

}  // namespace bbopd::cpu
