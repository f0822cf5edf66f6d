// What the ops take and return, as plain pointers: no header of torch is needed, so that one build serves every version
// of it. Shape suffixes: N tokens, D hidden, V vocabulary in use, K ids of a support.
#pragma once

#include <cstdint>

#include "row_math.h"

namespace bbopd::cpu {

using Index = std::int64_t;

enum class Type : int { float32, bfloat16, float16 };

// Rows of `columns` numbers, each row contiguous, `stride` numbers apart.
struct Matrix {
  const void* data = nullptr;
  Index rows = 0, columns = 0, stride = 0;
  Type type = Type::float32;
};

// softcap(scale * (hidden @ weight.T + bias)); softcap 0 is none.
struct Head {
  Matrix hidden, weight;        // [N, D], [V or more, D]
  const float* bias = nullptr;  // [V or more]
  float scale = 1.0F, softcap = 0.0F;
};

// What is known of the teacher's distribution.
enum class Signal : int { none, full, support, sampled };

struct DistillArguments {
  Index N = 0, V = 0, K = 0;
  Head student;
  Signal signal = Signal::none;
  Matrix teacher_logits;                     // full: [N, V or more], or
  Head teacher;                              // full: its own head
  const std::int64_t* ids = nullptr;         // support: [N, K], -1 is an empty slot; sampled: [N]
  const float* logprobs = nullptr;           // [N, K] or [N]
  const float* extra = nullptr;              // [N] log_tail, or the sampler's logprobs
  const std::int64_t* labels = nullptr;      // [N], -1 where there is none
  const std::uint8_t* has_signal = nullptr;  // [N]
  const float* ce_grad = nullptr;            // [N] dloss/dCE times the logits' scale
  const float* kd_grad = nullptr;            // [N] dloss/dKD times the logits' scale over T
  float temperature = 1.0F;
  rows::Divergence divergence = rows::Divergence::forward_kl;
  float beta = 0.5F, skew = 0.1F;
  Index stash_bytes =
      0;  // how much memory the first pass may fill with logits, so that the next need not multiply again
  int threads = 1;
  // written
  float* ce = nullptr;              // [N]
  float* kd = nullptr;              // [N], without T^2
  float* ratio = nullptr;           // [N] importance ratio of a sampled token, untruncated
  float* student_lse = nullptr;     // [N] at T
  float* teacher_lse = nullptr;     // [N] at T, full
  std::int32_t* floored = nullptr;  // [N]
  void* hidden_grad = nullptr;      // [N, D], or null
  void* weight_grad = nullptr;      // [V, D], or null
  float* bias_grad = nullptr;       // [V], or null
  Type hidden_grad_type = Type::float32, weight_grad_type = Type::float32;
};

struct LogprobsArguments {
  Index N = 0, V = 0, K = 0, M = 0;
  Head head;
  const std::int64_t* token_ids = nullptr;      // [N], or null
  const std::int32_t* candidate_ids = nullptr;  // [N, M], each row ascending; -1 is an empty slot
  float temperature = 1.0F;
  int threads = 1;
  // written; logarithms at the temperature
  float* logsumexp = nullptr;            // [N]
  float* sampled = nullptr;              // [N]
  std::int64_t* topk_ids = nullptr;      // [N, K]
  float* topk_logprobs = nullptr;        // [N, K]
  float* log_tail = nullptr;             // [N]
  float* candidates = nullptr;           // [N, M]
  float* candidates_log_tail = nullptr;  // [N]
};

// Rows of a teacher's answer with ids (rpc/signals.py says what they must be), to be checked and copied in one pass.
struct SignalRows {
  Index N = 0, K = 0, V = 0;
  const std::int32_t* ids = nullptr;             // [N, K], or
  const std::uint16_t* small_ids = nullptr;      // [N, K]
  const float* logprobs = nullptr;               // [N, K], or
  const std::uint16_t* half_logprobs = nullptr;  // [N, K], float16
  const float* log_tail = nullptr;               // [N]
  const float* sampled = nullptr;                // [N], the own token's logprob
  const std::int32_t* targets = nullptr;         // [N], the own tokens
  bool is_ranked = false;  // top-k: ids distinct and within the vocabulary, logprobs in falling order
  // written, each where it is not null: as received, with the mass of every row divided out,
  std::int32_t* ids_out = nullptr;  // [N, K]
  float* logprobs_out = nullptr;    // [N, K]
  float* log_tail_out = nullptr;    // [N]
  // or as sent
  std::uint16_t* small_ids_out = nullptr;      // [N, K]
  std::uint16_t* half_logprobs_out = nullptr;  // [N, K]
};

// torch's product of bfloat16 tiles, found at run time; null where this torch or this processor lacks it.
using Brgemm = void (*)(long, long, long, long, long, long, bool, const void*, const void*, float*, bool);
using BrgemmRelease = void (*)(bool);
struct Products {
  Brgemm multiply = nullptr;
  BrgemmRelease release = nullptr;
};

}  // namespace bbopd::cpu
