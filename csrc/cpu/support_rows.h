// Between the passes, for a token whose teacher gave a few ids: the divergence over those ids and the tail bucket, and
// the coefficients of its gradient. Ids are lanes.
#pragma once

#include "cpu/distill_rows.h"
#include "cpu/distill_tokens.h"
#include "cpu/gemm.h"

namespace bbopd::cpu::BBOPD_ISA {

// Room for one token's classes, K ids and the tail, in whole vectors.
class SupportRow {
 public:
  SupportRow(float* room, Index K)
      : lanes(lanes_for(K)), z(room), log_p(z + lanes), log_q(log_p + lanes), grad(log_q + lanes) {}
  static Index floats_for(Index K) { return 4 * lanes_for(K); }

  // `outside` is what the first pass summed outside the support. Fills the token's plan and its entries' gradients.
  void settle(const DistillArguments& a, const Temper& temper, Index n, const TokenSums& outside, SupportEntry* entries,
              int count, TokenPlan& plan) {
    const bool has_tail = outside.tempered.sum != 0.0;  // NaN counts
    for (int k = 0; k < count; ++k) z[k] = entries[k].logit;
    const int width = pad(z, count);
    TokenSums whole = outside;
    const float top = add(width, temper, whole);
    const double lse = whole.tempered.value(), plain_lse = whole.plain.value();
    plan.student_lse = static_cast<float>(lse);
    plan.plain_lse = static_cast<float>(plain_lse);
    plan.max = has_tail ? static_cast<float>(outside.plain.max) : 0.0F;

    const float ce_grad = a.labels != nullptr && a.labels[n] >= 0 ? a.ce_grad[n] : 0.0F;
    float tail_grad = 0.0F;
    for (int k = 0; k < width; k += kLanes) store(grad + k, vf{});
    if (a.has_signal[n] != 0 && count > 0) {
      // a tail that is empty by construction (K = V) can hold no mass of the teacher's either
      const float log_tail = has_tail ? a.extra[n] : -__builtin_inff();
      // from the largest logit, so that what matters most is rounded least
      const float log_sum = static_cast<float>(lse - static_cast<double>(top) * temper.inverse);
      for (int k = 0; k < width; k += kLanes) store(log_q + k, (load(z + k) - top) * temper.inverse - log_sum);
      log_q[count] = static_cast<float>(outside.tempered.value() - lse);
      for (int k = 0; k < count; ++k) log_p[k] = entries[k].logprob;
      log_p[count] = log_tail;
      const int classes = pad(log_p, count + 1);
      pad(log_q, count + 1);
      const float total = log_sum_of(log_p, classes);
      for (int k = 0; k < classes; k += kLanes) store(log_p + k, load(log_p + k) - total);
      const auto found = rows::with_divergence(a.divergence, [&]<Divergence kind>() {
        return rows::bucketed<kind, Vector>(log_p, log_q, classes, a.beta, a.skew, grad);
      });
      a.kd[n] = found.kd;
      a.floored[n] = found.floored;
      tail_grad = grad[count];
    }
    const bool is_capped = a.student.softcap != 0.0F;
    const float inverse_cap = is_capped ? 1.0F / a.student.softcap : 0.0F;
    for (int k = 0; k < width; k += kLanes) {
      const vf logit = load(z + k);
      vf g = load(grad + k) * a.kd_grad[n];
      if (ce_grad != 0.0F) g += exponential(logit - plan.plain_lse) * ce_grad;
      store(grad + k, is_capped ? g * slope(logit, inverse_cap) : g);
    }
    for (int k = 0; k < count; ++k) entries[k].gradient = grad[k];
    // inside the tail the student's own proportions stay: its gradient is the bucket's, spread by q_v / q_tail
    plan.tempered = has_tail ? static_cast<float>(tail_grad * a.kd_grad[n] / outside.tempered.sum) : 0.0F;
    plan.plain = has_tail && ce_grad != 0.0F
                     ? ce_grad * __builtin_expf(static_cast<float>(outside.plain.max - plain_lse))
                     : 0.0F;
  }

 private:
  static Index lanes_for(Index K) { return round_up(K + 1, kLanes); }

  // -inf up to the next whole vector, whose end is returned.
  static int pad(float* row, int count) {
    const int end = static_cast<int>(round_up(count, kLanes));
    for (int k = count; k < end; ++k) row[k] = -__builtin_inff();
    return end;
  }

  // Adds the support's logits, and returns their maximum (0 where there is no finite one).
  float add(int width, const Temper& temper, TokenSums& sums) const {
    if (width == 0) return 0.0F;
    Sums part{vf{}, vf{}, -__builtin_inff()};
    add_row(z, width, temper, true, part);
    const double max = part.max, tempered = sum_lanes(part.tempered);
    sums.tempered.merge({max * temper.inverse, tempered});
    sums.plain.merge({max, temper.power == Temper::same ? tempered : static_cast<double>(sum_lanes(part.plain))});
    return absolute(fill(part.max))[0] < __builtin_inff() ? part.max : 0.0F;
  }

  static float log_sum_of(const float* row, int width) {
    Sums part{vf{}, vf{}, -__builtin_inff()};
    add_row(row, width, Temper(1.0F), false, part);
    return static_cast<float>(rows::LogSumExp<double>{part.max, sum_lanes(part.tempered)}.value());
  }

  Index lanes = 0;
  float *z = nullptr, *log_p = nullptr, *log_q = nullptr, *grad = nullptr;
};

}  // namespace bbopd::cpu::BBOPD_ISA
