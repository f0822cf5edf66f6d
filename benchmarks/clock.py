"""How long a step takes: by the wall on a CPU, by the device's own events on a GPU, there with caches that hold nothing of the inputs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

FLUSHED_BYTES = 2**28  # more than any L2 there is


def seconds_of(step: Callable[[], object], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    _flushed().zero_()  # and while the device does this, the host gets ahead of it
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def wait(device: str) -> None:
    """Until the device has done all it was given, so that its errors come where they belong."""
    if device == "cuda":
        torch.cuda.synchronize()


def recover(device: str) -> None:
    """After an error: give back what is not in use. Raises where the device is lost to this process."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


@cache
def _flushed() -> Tensor:
    return torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda")
