// The only file that includes pybind11: what C++ gives to Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "cpu/alignment.h"
#include "cpu/buffer.h"
#include "cpu/crc32.h"
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

// Numbers of an array in C order: `type` is the character of Python's buffer protocol. Null where it is another array.
template <class T>
T* numbers_of(const py::buffer_info& info, char type, cpu::Index count) {
  py::ssize_t step = info.itemsize;
  for (auto i = static_cast<std::size_t>(info.ndim); i-- > 0; step *= info.shape[i])
    if (info.strides[i] != step && info.shape[i] > 1) return nullptr;
  const bool fits = info.format.size() == 1 && info.format[0] == type && info.size == count;
  return fits ? static_cast<T*>(info.ptr) : nullptr;
}

template <class T>
T* output_of(const std::optional<py::buffer_info>& info, char type, cpu::Index count) {
  if (!info || info->format[0] != type) return nullptr;
  T* const found = numbers_of<T>(*info, type, count);
  if (found == nullptr) throw std::invalid_argument("an output has another size than its input");
  return found;
}

std::optional<py::buffer_info> writable(const std::optional<py::buffer>& buffer) {
  return buffer ? std::optional(buffer->request(true)) : std::nullopt;
}

bool signal_rows(const py::buffer& ids, const py::buffer& logprobs, const py::buffer& log_tail,
                 const py::buffer& sampled, const py::buffer& targets, cpu::Index vocab_size, bool is_ranked, int level,
                 const std::optional<py::buffer>& ids_out, const py::buffer& logprobs_out,
                 const std::optional<py::buffer>& log_tail_out) {
  constexpr cpu::Index kLargestVocabulary = 1 << 22;  // a bit for each
  const py::buffer_info given_ids = ids.request(), given = logprobs.request(), tail = log_tail.request();
  const py::buffer_info own = sampled.request(), own_ids = targets.request();
  if (given_ids.ndim != 2 || given_ids.shape[1] < 1 || vocab_size < 1 || vocab_size > kLargestVocabulary) return false;
  cpu::SignalRows a;
  a.N = given_ids.shape[0], a.K = given_ids.shape[1], a.V = vocab_size;
  const cpu::Index size = a.N * a.K;
  a.ids = numbers_of<const std::int32_t>(given_ids, 'i', size);
  a.small_ids = numbers_of<const std::uint16_t>(given_ids, 'H', size);
  a.logprobs = numbers_of<const float>(given, 'f', size);
  a.half_logprobs = numbers_of<const std::uint16_t>(given, 'e', size);
  a.log_tail = numbers_of<const float>(tail, 'f', a.N);
  a.sampled = numbers_of<const float>(own, 'f', a.N);
  a.targets = numbers_of<const std::int32_t>(own_ids, 'i', a.N);
  a.is_ranked = is_ranked;
  if ((a.ids == nullptr && a.small_ids == nullptr) || (a.logprobs == nullptr && a.half_logprobs == nullptr) ||
      a.log_tail == nullptr || a.sampled == nullptr || a.targets == nullptr)
    return false;
  const auto new_ids = writable(ids_out), new_logprobs = writable(logprobs_out), new_tail = writable(log_tail_out);
  a.ids_out = output_of<std::int32_t>(new_ids, 'i', size);
  a.small_ids_out = output_of<std::uint16_t>(new_ids, 'H', size);
  a.logprobs_out = output_of<float>(new_logprobs, 'f', size);
  a.half_logprobs_out = output_of<std::uint16_t>(new_logprobs, 'e', size);
  a.log_tail_out = output_of<float>(new_tail, 'f', a.N);
  const py::gil_scoped_release unlocked;
  return cpu::signal_rows(a, static_cast<cpu::Level>(level));
}

std::uint32_t crc32(const py::buffer& data, std::uint32_t start) {
  const py::buffer_info info = data.request();
  const auto size = static_cast<cpu::Index>(info.size * info.itemsize);
  return cpu::crc32(static_cast<const std::uint8_t*>(info.ptr), static_cast<std::size_t>(size), start);
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
  module.def("signal_rows", &signal_rows, "Rows checked and copied in one pass; bbopd.rpc.rows says what each is.",
             py::arg("ids"), py::arg("logprobs"), py::arg("log_tail"), py::arg("sampled"), py::arg("targets"),
             py::arg("vocab_size"), py::arg("is_ranked"), py::arg("level"), py::arg("ids_out"), py::arg("logprobs_out"),
             py::arg("log_tail_out"));
  module.def("crc32", &crc32, "zlib.crc32 of an array in C order.", py::arg("data"), py::arg("start") = 0);
  module.def("release_unused_memory", &cpu::Buffer::release_unused,
             "Gives memory kept for the next call back to the system.");
  py::class_<cpu::Buffer>(module, "Buffer", py::buffer_protocol())
      .def(py::init<std::size_t>())
      .def_buffer([](const cpu::Buffer& buffer) {
        return py::buffer_info(buffer.as<std::uint8_t>(), static_cast<py::ssize_t>(buffer.bytes()));
      });
}
