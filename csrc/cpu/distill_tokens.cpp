#include "cpu/distill_tokens.h"

#include <algorithm>

namespace bbopd::cpu {

Tokens::Tokens(const DistillArguments& arguments) : a(arguments), all_plans(size(a.N)) {
  plans = all_plans.data();
  if (a.signal != Signal::support) return;
  entries.resize(size(a.N * a.K));
  counts.resize(size(a.N));
  first_entry = entries.data();
  first_count = counts.data();
}

Tokens::~Tokens() = default;

void Tokens::read_support(Index n) {
  SupportEntry* const row = support(n);
  int count = 0;
  for (Index k = 0; k < a.K; ++k) {
    const std::int64_t id = a.ids[n * a.K + k];
    if (id >= 0) row[count++] = {static_cast<std::int32_t>(id), a.logprobs[n * a.K + k]};
  }
  std::sort(row, row + count, [](const SupportEntry& x, const SupportEntry& y) { return x.id < y.id; });
  counts[size(n)] = count;
}

int Tokens::support_from(Index n, Index id) {
  const SupportEntry* const row = support(n);
  const auto is_before = [](const SupportEntry& entry, Index v) { return entry.id < v; };
  return static_cast<int>(std::lower_bound(row, row + counts[size(n)], id, is_before) - row);
}

void Tokens::settle(Index n, const TokenSums& sums) {
  TokenPlan& plan = plans[n];
  const bool labelled = a.labels != nullptr && a.labels[n] >= 0;
  const float ce_grad = labelled ? a.ce_grad[n] : 0.0F;
  if (a.signal != Signal::support) {
    // sums.tempered.max is max / T, sums.plain.max is max
    plan.max = static_cast<float>(sums.plain.max);
    plan.student_lse = static_cast<float>(sums.tempered.value());
    plan.plain_lse = static_cast<float>(sums.plain.value());
    plan.plain = static_cast<float>(ce_grad / sums.plain.sum);
    if (a.signal == Signal::full) {
      plan.log_sum = static_cast<float>(sums.tempered.value() - plan.max / static_cast<double>(a.temperature));
      plan.teacher_max = static_cast<float>(sums.teacher.max * a.temperature);
      plan.teacher_log_sum =
          static_cast<float>(sums.teacher.value() - plan.teacher_max / static_cast<double>(a.temperature));
      a.teacher_lse[n] = static_cast<float>(sums.teacher.value());
    }
    if (a.signal == Signal::sampled && a.has_signal[n] != 0) {
      // reverse KL by policy gradient: -min(q / q_old, cap) (log p - log q_old), whose gradient goes through the ratio
      // alone
      const float ratio = std::exp(plan.sampled_logit / a.temperature - plan.student_lse - a.extra[n]);
      const float kd = -std::min(ratio, rows::kRatioCap) * (a.logprobs[n] - a.extra[n]);
      a.ratio[n] = ratio;
      a.kd[n] = kd;
      plan.tempered = static_cast<float>(-kd * a.kd_grad[n] / sums.tempered.sum);
      plan.sampled_patch = kd * a.kd_grad[n] * slope(plan.sampled_logit);
    }
  }
  a.student_lse[n] = plan.student_lse;
  if (labelled) {
    a.ce[n] = plan.plain_lse - plan.label_logit;
    plan.label_patch = ce_grad * slope(plan.label_logit);
  }
}

}  // namespace bbopd::cpu
