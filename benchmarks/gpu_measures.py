"""What a GPU tells beside the time: peak memory, and how fast the passes over the logits read and write."""

from __future__ import annotations

import re

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.cases import Case
from benchmarks.contest import Resettable, Step

ROW_KERNELS = re.compile(r"(?:^|\W)(?:row_\w+|\w+_rows|finish_logits)\b")
TEACHER_BYTES = {"full": 2, "full_hidden": 4}  # float16 as it was sent, float32 as it was multiplied


def peak_mebibytes(step: Step, inputs: Resettable) -> float | None:
    """The allocator's peak in one step beyond what was there before and the gradients it leaves; None on a CPU."""
    if inputs.leaves[0].device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    outputs = sum(leaf.grad.nbytes for leaf in inputs.leaves if leaf.grad is not None)
    peak = torch.cuda.max_memory_allocated() - before - outputs
    inputs.drop_gradients()
    return max(peak, 0) / 2**20


def row_bytes(case: Case) -> int:
    """The least that the passes over the logits must move: float32 logits and the teacher's read twice, the gradient written once."""
    written = 2 if case.dtype == "bfloat16" else 4
    return case.N * case.V * (2 * 4 + 2 * TEACHER_BYTES.get(case.teacher, 0) + written)


def row_gigabytes_per_second(step: Step, inputs: Resettable, case: Case) -> float | None:
    """`row_bytes` by the time that the row kernels of one step take; None where the profiler shows none of them."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if case.device == "cuda" else [])]) as profiled:
        step()
        if case.device == "cuda":
            torch.cuda.synchronize()
    inputs.drop_gradients()
    kernels = (event for event in profiled.events() if ROW_KERNELS.search(event.name))
    microseconds = sum(event.self_device_time_total for event in kernels)
    return row_bytes(case) / microseconds / 1e3 if microseconds else None
