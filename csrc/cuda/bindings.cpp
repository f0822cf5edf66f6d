// What the kernels give to Python: each launch, on addresses; bbopd.cuda_rows says what each argument is.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cuda/arguments.h"

// The emulation that the tests build has another name.
#if !defined(BBOPD_CUDA_MODULE)
#define BBOPD_CUDA_MODULE _cuda
#endif

namespace py = pybind11;
using namespace bbopd::cuda;

namespace {

// A launch's named arguments.
class Given {
 public:
  explicit Given(const py::kwargs& from) : arguments(from) {}

  template <class Value>
  Value value(const char* name) const {
    return arguments[name].cast<Value>();
  }
  template <class Number>
  Number* address(const char* name) const {
    return reinterpret_cast<Number*>(value<std::uintptr_t>(name));
  }
  // (address, stride, width, type), or None.
  Matrix matrix(const char* name) const {
    const auto tuple = value<std::optional<std::tuple<std::uintptr_t, Index, int, int>>>(name);
    if (!tuple) return {nullptr, 0, 0, Type::float32};
    const auto& [from, stride, width, type] = *tuple;
    return {reinterpret_cast<void*>(from), stride, width, static_cast<Type>(type)};
  }
  // (bias address, inner or None, outer).
  Finish finish() const {
    const auto [bias, inner, outer] = value<std::tuple<std::uintptr_t, std::optional<float>, float>>("finish");
    return {reinterpret_cast<const float*>(bias), inner.has_value(), inner.value_or(0.0F), outer};
  }
  // (device, stream).
  Place place() const {
    const auto [device, stream] = value<std::tuple<int, std::uintptr_t>>("place");
    return {device, reinterpret_cast<void*>(stream)};
  }

 private:
  const py::kwargs& arguments;
};

void finish_with(const py::kwargs& kwargs) {
  const Given given(kwargs);
  finish({given.value<int>("V"), given.matrix("logits"), given.finish()}, given.value<Index>("n"), given.place());
}

void statistics_with(const py::kwargs& kwargs) {
  const Given given(kwargs);
  StatisticsArguments a{};
  a.n = given.value<Index>("n");
  a.V = given.value<int>("V");
  a.logits = given.matrix("logits");
  a.signal = given.address<const std::uint8_t>("signal");
  a.is_teacher = given.value<bool>("is_teacher");
  a.at_one = given.value<bool>("at_one");
  a.inverse_temperature = given.value<float>("inverse_temperature");
  a.statistics = given.address<float>("statistics");
  statistics(a, given.place());
}

void distill_with(const py::kwargs& kwargs) {
  const Given given(kwargs);
  DistillArguments a{};
  a.n = given.value<Index>("n");
  a.V = given.value<int>("V");
  a.logits = given.matrix("logits");
  a.gradient = given.matrix("gradient");
  a.statistics = given.address<const float>("statistics");
  a.labels = given.address<const std::int64_t>("labels");
  a.ce_grad = given.address<const float>("ce_grad");
  a.kd_grad = given.address<const float>("kd_grad");
  a.ids = given.address<const std::int64_t>("ids");
  a.inverse_temperature = given.value<float>("inverse_temperature");
  a.inverse_cap = given.value<float>("inverse_cap");
  a.teacher = given.matrix("teacher");
  a.teacher_statistics = given.address<const float>("teacher_statistics");
  a.signal = given.address<const std::uint8_t>("signal");
  a.divergence = static_cast<bbopd::rows::Divergence>(given.value<int>("divergence"));
  a.beta = given.value<float>("beta");
  a.skew = given.value<float>("skew");
  a.mean = given.address<const float>("mean");
  a.shares = given.address<float>("shares");
  distill(a, given.place());
}

void logprobs_with(const py::kwargs& kwargs) {
  const Given given(kwargs);
  LogprobsArguments a{};
  a.V = given.value<int>("V");
  a.logits = given.matrix("logits");
  a.finish = given.finish();
  a.token_ids = given.address<const std::int64_t>("token_ids");
  a.logsumexp = given.address<float>("logsumexp");
  a.sampled = given.address<float>("sampled");
  logprobs(a, given.value<Index>("n"), given.place());
}

void top_k_with(const py::kwargs& kwargs) {
  const Given given(kwargs);
  TopKArguments a{};
  a.V = given.value<int>("V");
  a.K = given.value<int>("K");
  a.logits = given.matrix("logits");
  a.keys = given.address<std::int64_t>("keys");
  top_k(a, given.value<Index>("n"), given.place());
}

}  // namespace

PYBIND11_MODULE(BBOPD_CUDA_MODULE, module) {
  module.doc() = "The CUDA kernels of bbopd: launches on addresses, on the caller's stream.";
  module.def("finish", &finish_with);
  module.def("statistics", &statistics_with);
  module.def("distill", &distill_with);
  module.def("logprobs", &logprobs_with);
  module.def("top_k", &top_k_with);
}
