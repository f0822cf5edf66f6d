"""Run as a process of its own: the peak memory of one step of one contestant, in bytes, as JSON on the last line of stdout."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.cases import Case

WARM_N, WARM_V = 64, 1024


def _status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _return_free_memory() -> None:
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def measure(suite_name: str, case: Case, name: str) -> int | None:
    """Bytes above what was resident before the step, less the gradients that it leaves; None without Linux's counters.

    A step of a small case comes first, so that libraries and their thread pools are loaded; of the whole case for what compiles.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    suite = importlib.import_module(suite_name)
    contestant = next(one for one in suite.CONTESTANTS if one.name == name)
    inputs = suite.draw(case)
    warm_inputs = inputs if contestant.is_compiled or not suite.RESIZES else suite.draw(case.resized(WARM_N, WARM_V))
    step = contestant.prepare(warm_inputs)
    step()
    warm_inputs.drop_gradients()
    if warm_inputs is not inputs:
        step = contestant.prepare(inputs)
    del warm_inputs
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to what is resident now
    before = _status_bytes("VmRSS")
    step()
    outputs = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
    return max(_status_bytes("VmHWM") - before - outputs, 0)


def main() -> None:
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    print(json.dumps(measure(request["suite"], Case(**request["case"]), request["contestant"])))


if __name__ == "__main__":
    main()
