// What the kernels take, as plain pointers into the GPU's memory, and the functions that launch them: a block for each
// row, on the caller's stream. Shape suffixes: n rows, V vocabulary in use, K top-k.
#pragma once

#include "cuda/numbers.h"
#include "row_math.h"

namespace bbopd::cuda {

// Where a kernel runs; a launch that fails is a std::runtime_error.
struct Place {
  int device;
  void* stream;
};

// softcap(scale * (z + bias)): outer * tanh(inner * (z + bias)), or without a cap outer * (z + bias).
struct Finish {
  const float* bias;  // [V or more], or null
  bool is_capped;
  float inner, outer;
};

struct FinishArguments {
  int V;
  Matrix logits;  // [n, V or more] float32, overwritten
  Finish finish;
};

struct StatisticsArguments {
  Index n;
  int V;
  Matrix logits;               // [n, V or more] of any type
  const std::uint8_t* signal;  // [n] rows to read, or null for all; another counts as zeros
  bool is_teacher;             // +inf takes all the mass
  bool at_one;                 // whether the sum at temperature 1 is wanted beside the one at T
  float inverse_temperature;
  float* statistics;  // [3, n] written: the maximum m, the sums of exp((z - m) / T) and of exp(z - m)
};

struct DistillArguments {
  Index n;
  int V;
  Matrix logits;  // [n, V or more] float32
  // [n, V or more] float32 or bfloat16, written: each row may begin where its logits do; null where none is needed
  Matrix gradient;
  const float* statistics;     // [3, n] the maximum, the logarithms of the sums at T and at 1
  const std::int64_t* labels;  // [n], or null
  const float* ce_grad;        // [n] the factor of q - onehot(label), q at temperature 1; or null
  const float* kd_grad;        // [n] the factor of the divergence's gradient, or of q - onehot(id), q at T; or null
  const std::int64_t* ids;     // [n], or null for q without onehot(id)
  float inverse_temperature;   //
  float inverse_cap;           // 1 / softcap, 0 without one
  Matrix teacher;              // [n, V or more] of any type, or null
  const float* teacher_statistics;  // [2 or more, n], as above
  const std::uint8_t* signal;       // [n] rows of the teacher to read, or null for all
  rows::Divergence divergence;
  float beta, skew;
  const float* mean;  // [n] the sum of q h over columns of which these are a part; or null where these are all
  // [3, n] written where there is a teacher and no mean: the divergence, the sum of q h, how many log p reverse KL read
  // as its floor
  float* shares;
};

struct LogprobsArguments {
  int V;
  Matrix logits;                  // [n, V or more] float32, before they are finished
  Finish finish;                  // and divided by the temperature
  const std::int64_t* token_ids;  // [n], or null
  float* logsumexp;               // [n] written
  float* sampled;                 // [n] written where there are token_ids, NaN for one outside the vocabulary
};

struct TopKArguments {
  int V, K;
  Matrix logits;  // [n, V or more] float32
  // [n, K] written, in no order: a logit in the order of signed integers, then the complement of its id; no two are
  // equal, the larger logit is the larger key, and of equal logits the lower id
  std::int64_t* keys;
};

void finish(const FinishArguments& arguments, Index n, Place place);
void statistics(const StatisticsArguments& arguments, Place place);
void distill(const DistillArguments& arguments, Place place);
void logprobs(const LogprobsArguments& arguments, Index n, Place place);
void top_k(const TopKArguments& arguments, Index n, Place place);

}  // namespace bbopd::cuda
