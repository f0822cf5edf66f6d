"""Peak memory between two moments: of the GPU's allocator, or of this process as Linux counts it."""

from __future__ import annotations

from pathlib import Path

import torch

_RESET = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def reset_peak(device: torch.device) -> None:
    """Let the high-water mark be what is in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif _RESET.exists():
        _RESET.write_text("5")


def peak_bytes(device: torch.device) -> int | None:
    """The most that was in use since `reset_peak`: by this process's tensors on a GPU, else resident. None where nothing counts it."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if not _RESET.exists():
        return None
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024
