// The only file that includes pybind11: what C++ gives to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "cpu/alignment.h"
#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "cpu/features.h"

namespace py = pybind11;
using namespace bbopd;

namespace {

// Tensors come as (address, rows, columns, stride, type), or None.
using MatrixTuple = std::optional<std::tuple<std::uintptr_t, cpu::Index, cpu::Index, cpu::Index, int>>;

cpu::Matrix to_matrix(const MatrixTuple& tuple) {
  if (!tuple) return {};
  const auto& [address, rows, columns, stride, type] = *tuple;
  return {reinterpret_cast<const void*>(address), rows, columns, stride, static_cast<cpu::Type>(type)};
}

template <class T>
T* to_pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

using HeadTuple = std::tuple<MatrixTuple, MatrixTuple, std::uintptr_t, float, float>;

cpu::Head to_head(const HeadTuple& tuple) {
  const auto& [hidden, weight, bias, scale, softcap] = tuple;
  return {to_matrix(hidden), to_matrix(weight), to_pointer<const float>(bias), scale, softcap};
}

void distill(const py::dict& given) {
  const auto address = [&](const char* name) { return given[name].cast<std::uintptr_t>(); };
  cpu::DistillArguments a;
  a.N = given["N"].cast<cpu::Index>();
  a.V = given["V"].cast<cpu::Index>();
  a.K = given["K"].cast<cpu::Index>();
  a.student = to_head(given["student"].cast<HeadTuple>());
  a.signal = static_cast<cpu::Signal>(given["signal"].cast<int>());
  a.teacher_logits = to_matrix(given["teacher_logits"].cast<MatrixTuple>());
  a.teacher = to_head(given["teacher"].cast<HeadTuple>());
  a.ids = to_pointer<const std::int64_t>(address("ids"));
  a.logprobs = to_pointer<const float>(address("logprobs"));
  a.extra = to_pointer<const float>(address("extra"));
  a.labels = to_pointer<const std::int64_t>(address("labels"));
  a.has_signal = to_pointer<const std::uint8_t>(address("has_signal"));
  a.ce_grad = to_pointer<const float>(address("ce_grad"));
  a.kd_grad = to_pointer<const float>(address("kd_grad"));
  a.temperature = given["temperature"].cast<float>();
  a.divergence = static_cast<rows::Divergence>(given["divergence"].cast<int>());
  a.beta = given["beta"].cast<float>();
  a.skew = given["skew"].cast<float>();
  a.stash_bytes = given["stash_bytes"].cast<cpu::Index>();
  a.threads = given["threads"].cast<int>();
  a.ce = to_pointer<float>(address("ce"));
  a.kd = to_pointer<float>(address("kd"));
  a.ratio = to_pointer<float>(address("ratio"));
  a.student_lse = to_pointer<float>(address("student_lse"));
  a.teacher_lse = to_pointer<float>(address("teacher_lse"));
  a.floored = to_pointer<std::int32_t>(address("floored"));
  a.hidden_grad = to_pointer<void>(address("hidden_grad"));
  a.weight_grad = to_pointer<void>(address("weight_grad"));
  a.bias_grad = to_pointer<float>(address("bias_grad"));
  a.hidden_grad_type = static_cast<cpu::Type>(given["hidden_grad_type"].cast<int>());
  a.weight_grad_type = static_cast<cpu::Type>(given["weight_grad_type"].cast<int>());
  const auto level = static_cast<cpu::Level>(given["level"].cast<int>());
  const py::gil_scoped_release unlocked;
  cpu::distill(a, level);
}

void logprobs(const py::dict& given) {
  const auto address = [&](const char* name) { return given[name].cast<std::uintptr_t>(); };
  cpu::LogprobsArguments a;
  a.N = given["N"].cast<cpu::Index>();
  a.V = given["V"].cast<cpu::Index>();
  a.K = given["K"].cast<cpu::Index>();
  a.M = given["M"].cast<cpu::Index>();
  a.head = to_head(given["head"].cast<HeadTuple>());
  a.token_ids = to_pointer<const std::int64_t>(address("token_ids"));
  a.candidate_ids = to_pointer<const std::int32_t>(address("candidate_ids"));
  a.temperature = given["temperature"].cast<float>();
  a.threads = given["threads"].cast<int>();
  a.logsumexp = to_pointer<float>(address("logsumexp"));
  a.sampled = to_pointer<float>(address("sampled"));
  a.topk_ids = to_pointer<std::int64_t>(address("topk_ids"));
  a.topk_logprobs = to_pointer<float>(address("topk_logprobs"));
  a.log_tail = to_pointer<float>(address("log_tail"));
  a.candidates = to_pointer<float>(address("candidates"));
  a.candidates_log_tail = to_pointer<float>(address("candidates_log_tail"));
  const auto level = static_cast<cpu::Level>(given["level"].cast<int>());
  const py::gil_scoped_release unlocked;
  cpu::logprobs(a, level);
}

// Tokens come as (address of ids, how many) and their vocabulary as the addresses of offsets, bytes and is_text, and
// its size.
using TokensTuple = std::tuple<std::uintptr_t, cpu::Index>;
using BytesTuple = std::tuple<std::uintptr_t, std::uintptr_t, std::uintptr_t, cpu::Index>;

cpu::Tokens to_tokens(const TokensTuple& tokens, const BytesTuple& vocabulary) {
  const auto& [ids, count] = tokens;
  const auto& [offsets, bytes, is_text, size] = vocabulary;
  return {to_pointer<const std::int64_t>(ids),     count,
          to_pointer<const std::int64_t>(offsets), to_pointer<const std::uint8_t>(bytes),
          to_pointer<const std::uint8_t>(is_text), size};
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of bbopd.";
  module.def(
      "cpu_features",
      [] {
        const cpu::Features found = cpu::detect_features();
        py::dict result;
        result["avx2"] = found.avx2;
        result["avx512"] = found.avx512;
        result["avx512_bf16"] = found.avx512_bf16;
        result["amx_bf16"] = found.amx_bf16;
        return result;
      },
      "What this processor and operating system allow: avx2, avx512, avx512_bf16, amx_bf16, each a bool.");
  module.def(
      "best_level", [] { return static_cast<int>(cpu::best_level()); },
      "The best kernels this machine can run: 0 portable, 1 avx2, 2 avx512, 3 avx512_bf16, 4 amx_bf16.");
  module.def("linear_distill", &distill, "The op on addresses; bbopd.cpu_distill says what each is.");
  module.def("linear_logprobs", &logprobs, "The op on addresses; bbopd.cpu_logprobs says what each is.");
  module.def(
      "align_tokens",
      [](const TokensTuple& first, const BytesTuple& of_first, const TokensTuple& second, const BytesTuple& of_second,
         std::uintptr_t ends) {
        return cpu::align_tokens(to_tokens(first, of_first), to_tokens(second, of_second),
                                 to_pointer<std::int64_t>(ends));
      },
      "Groups of tokens that spell the same bytes; bbopd.alignment says what each argument is.");
  module.def("release_unused_memory", &cpu::Buffer::release_unused,
             "Gives memory kept for the next call back to the system.");
  py::class_<cpu::Buffer>(module, "Buffer", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const cpu::Buffer& buffer) {
        return py::buffer_info(buffer.as<std::uint8_t>(), static_cast<py::ssize_t>(buffer.bytes()));
      });
}
