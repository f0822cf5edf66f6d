"""The environment that makes vLLM quick on a CPU, found and set by itself.

Three things decide: Intel's OpenMP in place of GNU's, a thread bound to each physical core, and an allocator that keeps memory. Two of
them must be there before a process starts (``LD_PRELOAD``), so the engine's process is started with them and nobody else's is changed.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterable, Mapping
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path

_OPENMP = ("intel-openmp", "libiomp5.so", "pip install intel-openmp")
_ALLOCATOR = "libtcmalloc_minimal.so.4"
_LIBRARY_FOLDERS = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")

# Values that someone has set already are kept: this is a default, not a verdict.
_ALWAYS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's process is the engine: no second one behind it
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # vLLM binds the threads of processes that it starts; this one is bound as it starts
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_LOGGING_COLOR": "0",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True, slots=True)
class EngineEnvironment:
    """``variables`` is the whole environment of the engine's process; ``notes`` say what is missing and how to get it."""

    variables: Mapping[str, str]
    notes: tuple[str, ...] = ()


def engine_environment(device_type: str, base: Mapping[str, str] | None = None) -> EngineEnvironment:
    """The environment for an engine on ``"cpu"`` or ``"cuda"``, over ``base`` (that of this process)."""
    variables = dict(os.environ if base is None else base)
    defaults = dict(_ALWAYS)
    notes: list[str] = []
    if device_type == "cpu":
        found, notes = _preloads()
        already = variables.get("LD_PRELOAD", "").replace(":", " ").split()
        names = {_stem(path) for path in already}
        preloaded = [*already, *(path for path in found if _stem(path) not in names)]
        variables["LD_PRELOAD"] = ":".join(preloaded)
        cores = physical_cores()
        variables["OMP_NUM_THREADS"] = str(len(cores))
        if "libiomp5" in map(_stem, preloaded):
            defaults["KMP_AFFINITY"] = f"granularity=fine,explicit,proclist=[{','.join(map(str, cores))}]"
            defaults["KMP_BLOCKTIME"] = "5"  # milliseconds that an idle thread keeps its core; the trainer wants it next
    return EngineEnvironment({**defaults, **variables}, tuple(notes))


def _stem(path: str) -> str:
    return Path(path).name.partition(".so")[0]


def _preloads() -> tuple[list[str], list[str]]:
    """Paths of what to preload, as far as it is installed, and a note for what is not."""
    found, notes = [], []
    package, library, remedy = _OPENMP
    openmp = _library_of(package, library)
    if openmp is not None:
        found.append(openmp)
    else:
        notes.append(f"{library} is not installed, so vLLM samples several times slower than it could: {remedy}")
    allocator = _system_library(_ALLOCATOR)
    if allocator is not None:
        found.append(allocator)
    else:
        notes.append(f"{_ALLOCATOR} is not installed, so vLLM samples somewhat slower than it could: apt-get install libtcmalloc-minimal4")
    return found, notes


def _library_of(package: str, library: str) -> str | None:
    """Path of a shared library that a Python package has installed."""
    try:
        files = importlib.metadata.files(package) or ()
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(Path(str(file.locate())).resolve()) for file in files if file.name == library), None)


def _system_library(name: str) -> str | None:
    known = next((str(Path(folder) / name) for folder in _LIBRARY_FOLDERS if (Path(folder) / name).exists()), None)
    return known or find_library(name.removeprefix("lib").partition(".so")[0])


def physical_cores(allowed: Iterable[int] | None = None, topology: Path = Path("/sys/devices/system/cpu")) -> list[int]:
    """One logical processor of every physical core among ``allowed`` (those this process may run on), in rising order."""
    cores: dict[str, int] = {}
    for processor in sorted(os.sched_getaffinity(0) if allowed is None else allowed):
        try:
            siblings = (topology / f"cpu{processor}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(processor)
        cores.setdefault(siblings, processor)
    return sorted(cores.values())
