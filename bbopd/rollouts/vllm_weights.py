"""The trainer's end of a weight push: parameters go through one window of memory that both processes see, a window at a time.

On a CPU the window is an anonymous file in memory, on a GPU a block of its memory that the engine's process maps by CUDA's
inter-process handles. So a push needs no file, and never holds more of a second copy than the window, however large the model.
"""

from __future__ import annotations

import base64
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

_WINDOW = 64 * 2**20  # bytes; more where a single parameter is larger
_ALIGNMENT = 64


class WeightWindow:
    """A window that takes any parameter of ``sizes`` elements, converted to ``dtype``."""

    def __init__(self, sizes: Iterable[int], dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        largest = max(sizes) * dtype.itemsize
        self.capacity = math.ceil(max(largest, _WINDOW) / mmap.PAGESIZE) * mmap.PAGESIZE
        self._map: mmap.mmap | None = None
        self.file: int | None = None
        if device.type == "cpu":
            self.file = os.memfd_create("bbopd-weights")
            os.ftruncate(self.file, self.capacity)
            self._map = mmap.mmap(self.file, self.capacity)
            self.memory = torch.frombuffer(self._map, dtype=torch.uint8)
        else:
            self.memory = torch.empty(self.capacity, dtype=torch.uint8, device=device)

    def describe(self) -> dict[str, Any]:
        """What the other process needs to see the same memory, as JSON."""
        shared: dict[str, Any] = {"capacity": self.capacity, "dtype": str(self.dtype).removeprefix("torch.")}
        if self.file is not None:
            return {**shared, "file": self.file}
        from torch.multiprocessing.reductions import reduce_tensor

        _, arguments = reduce_tensor(self.memory)
        return {**shared, "cuda": [encode_argument(argument) for argument in arguments]}

    def fill(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[dict[str, Any]]]:
        """Write ``weights`` into the window until it is full, and say what lies where; going on overwrites it.

        Yields lists of ``{"name", "shape", "offset"}``, offsets in bytes.
        """
        entries: list[dict[str, Any]] = []
        offset = 0
        for name, tensor in weights:
            size = tensor.numel() * self.dtype.itemsize
            if entries and offset + size > self.capacity:
                yield self._written(entries)
                entries, offset = [], 0
            target = self.memory[offset : offset + size].view(self.dtype).view(tensor.shape)
            target.copy_(tensor.detach())
            entries.append({"name": name, "shape": list(tensor.shape), "offset": offset})
            offset = math.ceil((offset + size) / _ALIGNMENT) * _ALIGNMENT
        if entries:
            yield self._written(entries)

    def end_of(self, entries: list[dict[str, Any]]) -> int:
        """How many bytes of the window ``entries``, an item of `fill`, take."""
        return max(entry["offset"] + math.prod(entry["shape"]) * self.dtype.itemsize for entry in entries)

    def _written(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the other process reads as soon as it hears of this
        return entries

    def close(self) -> None:
        """Give the memory back. Harmless where it has been given back."""
        self.memory = torch.empty(0, dtype=torch.uint8)
        if self.file is not None:
            os.close(self.file)
            self.file = None
        self._map = None


def view_tensors(memory: Tensor, entries: Iterable[dict[str, Any]], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """What `WeightWindow.fill` has written, as names and views of the window's ``memory``, valid until it is filled again."""
    for entry in entries:
        start, size = entry["offset"], math.prod(entry["shape"]) * dtype.itemsize
        yield entry["name"], memory[start : start + size].view(dtype).view(entry["shape"])


def encode_argument(value: Any) -> Any:
    """An argument of ``torch.multiprocessing.reductions.rebuild_cuda_tensor`` as JSON."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.Size | tuple):
        return list(value)
    if isinstance(value, torch.dtype | type):
        return None  # known to both sides
    return value
