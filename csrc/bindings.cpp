// The only file that includes pybind11: what C++ gives to Python.
#include <pybind11/pybind11.h>

#include "cpu/features.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled parts of bbopd.";
  module.def(
      "cpu_features",
      [] {
        const bbopd::cpu::Features found = bbopd::cpu::detect_features();
        py::dict result;
        result["avx2"] = found.avx2;
        result["avx512"] = found.avx512;
        result["avx512_bf16"] = found.avx512_bf16;
        result["amx_bf16"] = found.amx_bf16;
        return result;
      },
      "What this processor and operating system allow: avx2, avx512, avx512_bf16, amx_bf16, each a bool.");
}
