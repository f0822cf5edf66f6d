// What is known of each token between the passes over the vocabulary: the support with its logits, and the coefficients
// of its gradient.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/arguments.h"

namespace bbopd::cpu {

// A token's ids in ascending order, without the empty slots.
struct SupportEntry {
  std::int32_t id;
  float logprob;
  float logit = 0.0F;     // filled by the first pass
  float gradient = 0.0F;  // filled between the passes
};

// Statistics of a token over the whole vocabulary (outside its support, where it has one).
struct TokenSums {
  rows::LogSumExp<double> tempered, plain;  // of z / T and of z
  rows::LogSumExp<double> teacher;          // of the teacher's logits over T
};

// What the last pass needs of a token: outside its support the gradient is tempered * exp((z - max) / T) + plain *
// exp(z - max).
struct TokenPlan {
  float max = 0.0F, tempered = 0.0F, plain = 0.0F;
  float label_logit = 0.0F, label_patch = 0.0F;
  float sampled_logit = 0.0F, sampled_patch = 0.0F;
  float log_sum = 0.0F, teacher_max = 0.0F, teacher_log_sum = 0.0F;
  float student_lse = 0.0F, plain_lse = 0.0F, mean = 0.0F;
};

// Its members are compiled for the baseline instruction set, as every kernel shares them.
class Tokens {
 public:
  explicit Tokens(const DistillArguments& arguments);
  ~Tokens();

  // Sorts the support of a token.
  void read_support(Index n);

  SupportEntry* support(Index n) { return first_entry + n * a.K; }
  int support_size(Index n) const { return a.signal == Signal::support ? first_count[n] : 0; }
  // The first entry of a token's support with an id of at least `id`.
  int support_from(Index n, Index id);
  // Between the passes: the losses that need no further look at the logits, and the coefficients of the gradient; those
  // of a support are there already.
  void settle(Index n, const TokenSums& sums);

  const DistillArguments& a;
  TokenPlan* plans = nullptr;  // [N]

 private:
  static std::size_t size(Index n) { return static_cast<std::size_t>(n); }
  // The softcap's slope at a logit; 1 without a cap.
  float slope(float logit) const {
    const float t = a.student.softcap == 0.0F ? 0.0F : logit / a.student.softcap;
    return 1.0F - t * t;
  }

  std::vector<SupportEntry> entries;
  std::vector<int> counts;
  std::vector<TokenPlan> all_plans;
  SupportEntry* first_entry = nullptr;
  int* first_count = nullptr;
};

}  // namespace bbopd::cpu
