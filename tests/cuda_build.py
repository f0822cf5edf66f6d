"""The CUDA kernels without a GPU: compiled by nvcc for what there is to know of them, and by g++ as an emulation."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch

from bbopd.types import DIVERGENCES
from tests.resource_table import Usage

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "cuda" / "kernels.cu"
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
KERNELS = (
    "finish_rows",
    "statistics_rows",
    "logprobs_rows",
    "sparse_rows",
    *(f"full_rows {divergence}" for divergence in DIVERGENCES),
    "top_k_rows",
)
"""Every kernel in a cubin."""
THREADS = 256
"""Of a block, in each of them (`kThreads` in csrc/cuda/block.h)."""


def compile_kernels(architecture: str) -> dict[str, Usage]:
    """Compile the kernels for an architecture, every warning an error, with the options of CMakeLists.txt; what each of `KERNELS` takes."""
    nvcc = shutil.which("nvcc")
    assert nvcc is not None
    options = ["-std=c++20", "--expt-relaxed-constexpr", "--fmad=false", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-Werror"]
    target = ["-cubin", f"-arch={architecture}", "-Xptxas=-v", f"-I{ROOT / 'csrc'}", str(SOURCE), "-o"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        done = subprocess.run([nvcc, *options, *target, cubin.name], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    version = re.search(r"release .*V(\S+)", subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout)
    assert version is not None
    found, names = {}, "|".join({name.split()[0] for name in KERNELS})
    for part in done.stderr.split("Compiling entry function ")[1:]:
        kernel = re.match(rf"'\w*\d({names})(?:I\w*?DivergenceE(\d))?", part)  # of a mangled name
        assert kernel is not None, part
        name = kernel[1] if kernel[2] is None else f"{kernel[1]} {DIVERGENCES[int(kernel[2])]}"
        found[name] = Usage(
            kernel=kernel[1],
            variant=name,
            capability=_number(r"sm_(\d+)", architecture),
            registers=_number(r"Used (\d+) registers", part),
            shared=_number(r"(\d+) bytes smem", part),
            stack=_number(r"(\d+) bytes stack frame", part),
            spilled=_number(r"(\d+) bytes spill stores", part) + _number(r"(\d+) bytes spill loads", part),
            threads=THREADS,
            compiler=f"nvcc {version[1]}",
        )
    return found


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


EMULATION = f"cuda_emulation{sysconfig.get_config_var('EXT_SUFFIX')}"


def build_emulation(folder: Path) -> Any:
    """The extension ``bbopd._cuda`` as it would be, over a block whose threads take turns on the host (tests/cuda_emulation.cpp)."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None, "the extension was built, so there is a compiler"
    headers = [ROOT / "csrc", sysconfig.get_paths()["include"], Path(torch.__file__).parent / "include"]  # pybind11 is among torch's
    options = ["-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"]
    options += ["-fno-strict-aliasing"]  # bfloat16 goes where float32 was, and no barrier of the host's keeps the two apart
    sources = [ROOT / "tests" / "cuda_emulation.cpp", ROOT / "csrc" / "cuda" / "bindings.cpp"]
    command = [compiler, *options, "-DBBOPD_CUDA_MODULE=cuda_emulation", f"-I{headers[0]}", *(f"-isystem{path}" for path in headers[1:])]
    subprocess.run([*command, *map(str, sources), "-o", str(folder / EMULATION)], check=True, timeout=240)
    return load_emulation(folder)


def load_emulation(folder: Path) -> Any:
    """What `build_emulation` left in ``folder``."""
    found = importlib.util.spec_from_file_location("cuda_emulation", folder / EMULATION)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module
