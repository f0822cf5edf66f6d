"""What student and teacher share of vLLM: whether it is there, the environment that makes it quick on a CPU, what its cache takes.

Of the environment three things decide: Intel's OpenMP in place of GNU's, a thread bound to each physical core, and an allocator that
keeps memory. Two of them must be there before a process starts (``LD_PRELOAD``): the process of a run's engine is started with them, a
teacher's is started anew in its place.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from ctypes.util import find_library
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbopd.errors import EngineError

_OPENMP = ("intel-openmp", "libiomp5.so", "pip install intel-openmp")
_KV_BLOCK = 128  # tokens; vLLM's on a CPU
_ALLOCATOR = "libtcmalloc_minimal.so.4"
_STARTED_ANEW = "BBOPD_ENGINE_PROCESSORS"  # those that a process might use before it was started anew
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


def require_vllm(asked: str, otherwise: str = "") -> None:
    """Raises `EngineError` where vLLM is not installed in this environment; ``asked`` says who wants it, ``otherwise`` the way without."""
    with suppress(ValueError):
        if importlib.util.find_spec("vllm") is not None:
            return
    raise EngineError(
        f"{asked}, but vLLM is not installed here: pip install 'bbopd[vllm]' on a machine with a GPU; on a CPU, "
        f"`make vllm` sets up an environment with vLLM's CPU build{otherwise and f'; or {otherwise}'}"
    )


def enter_engine_environment(device_type: str) -> tuple[str, ...]:
    """Start this very command anew, in this process, with an engine's environment; where it has been, return the notes on that.

    OpenMP, once it is there, binds the main thread to one core, which further threads would inherit: that is undone.
    """
    if (processors := os.environ.pop(_STARTED_ANEW, None)) is None:
        variables = dict(engine_environment(device_type).variables)
        variables[_STARTED_ANEW] = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        sys.stdout.flush()
        sys.stderr.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], variables)
    os.sched_setaffinity(0, {int(processor) for processor in processors.split(",")})
    return tuple(_preloads()[1]) if device_type == "cpu" else ()


def kv_bytes_of_token(config: Any, itemsize: int) -> int:
    """Bytes of keys and values of one token, for a decoder of which ``config`` is the Hugging Face configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 2 * config.num_hidden_layers * (getattr(config, "num_key_value_heads", None) or heads) * width * itemsize


def cpu_cache_bytes(of_token: int, *, sequence_tokens: int, sequences: int) -> int:
    """Memory for keys and values of a whole batch at its longest, as far as a quarter of what is free; what finds no room waits."""
    of_sequence = of_token * math.ceil(sequence_tokens / _KV_BLOCK) * _KV_BLOCK
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(2 * of_sequence, min(sequences * of_sequence, free // 4))


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
