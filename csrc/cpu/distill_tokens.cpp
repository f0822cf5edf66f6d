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
  if (a.signal == Signal::support) {
    settle_support(n, sums);
  } else {
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

void Tokens::settle_support(Index n, const TokenSums& sums) {
  TokenPlan& plan = plans[n];
  SupportEntry* const row = support(n);
  const int count = counts[size(n)], classes = count + 1;
  const double T = a.temperature;
  const bool outside = sums.tempered.sum != 0.0;  // NaN counts
  rows::LogSumExp<double> tempered = sums.tempered, plain = sums.plain;
  for (int k = 0; k < count; ++k) {
    tempered.add(row[k].logit / T);
    plain.add(row[k].logit);
  }
  const double lse = tempered.value(), plain_lse = plain.value();
  plan.student_lse = static_cast<float>(lse);
  plan.plain_lse = static_cast<float>(plain_lse);
  plan.max = outside ? static_cast<float>(sums.plain.max) : 0.0F;

  const float ce_grad = a.labels != nullptr && a.labels[n] >= 0 ? a.ce_grad[n] : 0.0F;
  std::vector<float> gradient(size(classes), 0.0F);
  if (a.has_signal[n] != 0 && count > 0) {
    // a tail that is empty by construction (K = V) can hold no mass of the teacher's either
    std::vector<float> log_p(size(classes)), log_q(size(classes));
    rows::LogSumExp<double> mass;
    for (int k = 0; k < count; ++k) mass.add(row[k].logprob);
    const float log_tail = outside ? a.extra[n] : -INFINITY;
    mass.add(log_tail);
    const double total = mass.value();
    for (int k = 0; k < count; ++k) {
      log_p[size(k)] = static_cast<float>(row[k].logprob - total);
      log_q[size(k)] = static_cast<float>(row[k].logit / T - lse);
    }
    log_p[size(count)] = static_cast<float>(log_tail - total);
    log_q[size(count)] = static_cast<float>(sums.tempered.value() - lse);
    const rows::BucketedRow<float> found = rows::with_divergence(a.divergence, [&]<rows::Divergence kind>() {
      return rows::bucketed<kind, float>(log_p.data(), log_q.data(), classes, a.beta, a.skew, gradient.data());
    });
    a.kd[n] = found.kd;
    a.floored[n] = found.floored;
  }
  for (int k = 0; k < count; ++k) {
    const float kd = gradient[size(k)] * a.kd_grad[n];
    const float ce = ce_grad == 0.0F ? 0.0F : ce_grad * std::exp(static_cast<float>(row[k].logit - plain_lse));
    row[k].gradient = (kd + ce) * slope(row[k].logit);
  }
  // inside the tail the student's own proportions stay: its gradient is the bucket's, spread by q_v / q_tail
  plan.tempered = outside ? static_cast<float>(gradient[size(count)] * a.kd_grad[n] / sums.tempered.sum) : 0.0F;
  plan.plain = outside && ce_grad != 0.0F ? ce_grad * std::exp(static_cast<float>(sums.plain.max - plain_lse)) : 0.0F;
}

}  // namespace bbopd::cpu
