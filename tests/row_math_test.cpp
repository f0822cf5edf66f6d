// Each divergence of csrc/row_math.h, in float, against its definition in long double, and its gradient against central differences of that.
#include "row_math.h"

#include <cstdio>
#include <random>
#include <vector>

using namespace bbopd::rows;
using Long = long double;

static Long ratio(Long a, Long b) { return a > 0 ? a * std::log(a / b) : 0; }

static Long defined(Divergence kind, const std::vector<Long>& log_p, const std::vector<Long>& u, Long beta, Long skew) {
  LogSumExp<Long> lse;
  for (const Long x : u) lse.add(x);
  Long sum = 0;
  for (std::size_t i = 0; i < u.size(); ++i) {
    const Long p = std::exp(log_p[i]), q = std::exp(u[i] - lse.value());
    const Long floored = std::exp(std::max(log_p[i], Long(kLogPFloor)));
    switch (kind) {
      case Divergence::forward_kl: sum += ratio(p, q); break;
      case Divergence::reverse_kl: sum += ratio(q, floored); break;
      case Divergence::jsd: sum += beta * ratio(p, beta * p + (1 - beta) * q) + (1 - beta) * ratio(q, beta * p + (1 - beta) * q); break;
      case Divergence::skew_forward_kl: sum += ratio(p, skew * p + (1 - skew) * q); break;
      case Divergence::skew_reverse_kl: sum += ratio(q, skew * q + (1 - skew) * p); break;
    }
  }
  return sum;
}

int main() {
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  int failures = 0;
  for (const int classes : {1, 2, 65})
    for (const double spread : {1e-3, 1.0, 6.0})
      for (int k = 0; k < 5; ++k) {
        const auto kind = static_cast<Divergence>(k);
        const Long beta = 0.3L, skew = 0.2L;
        std::vector<Long> u, log_p;
        LogSumExp<Long> mass;
        for (int i = 0; i < classes; ++i) {
          u.push_back(3 * normal(random));
          log_p.push_back(u.back() + spread * normal(random));
          mass.add(log_p.back());
        }
        for (Long& x : log_p) x -= mass.value();
        LogSumExp<Long> left, right;
        for (int i = 0; i < classes; ++i) (i % 2 ? left : right).add(u[i]);
        left.merge(right);
        std::vector<float> lp, lq, gradient(classes);
        for (int i = 0; i < classes; ++i) lp.push_back(float(log_p[i])), lq.push_back(float(u[i] - left.value()));
        const auto row = with_divergence(kind, [&]<Divergence which>() {
          return bucketed<which, Scalar<float>>(lp.data(), lq.data(), classes, float(beta), float(skew), gradient.data());
        });
        const Long truth = defined(kind, log_p, u, beta, skew);
        // log-probabilities come rounded to float, each by up to 1e-6
        bool good = std::fabs(row.kd - truth) <= 2e-6L * spread + 1e-5L * truth + 1e-12L && row.kd >= -1e-12;
        for (int i = 0; i < classes; ++i) {
          const Long step = 1e-6L;
          std::vector<Long> up = u, down = u;
          up[i] += step, down[i] -= step;
          const Long slope = (defined(kind, log_p, up, beta, skew) - defined(kind, log_p, down, beta, skew)) / (2 * step);
          good &= std::fabs(gradient[i] - slope) <= 2e-6L + 1e-5L * std::fabs(slope);
        }
        if (!good) {
          ++failures;
          std::printf("divergence %d, %d classes, spread %g: %.9g against %.9Lg\n", k, classes, spread, double(row.kd), truth);
        }
      }
  LogSumExp<float> nothing;
  nothing.add(-INFINITY);
  nothing.merge({});
  LogSumExp<float> spoiled;
  spoiled.add(1.0F);
  spoiled.add(NAN);
  if (nothing.value() != -INFINITY || !std::isnan(spoiled.value())) ++failures, std::puts("empty or NaN rows");
  return failures;
}
