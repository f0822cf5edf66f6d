"""Memory that is freed, kept for what is allocated next."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_LARGEST = 32 * 2**20  # bytes of one buffer that may be kept: no more can be asked for
_KEPT = 128 * 2**20  # bytes free at the top of the heap before they go back to the system


def keep_freed_memory() -> bool:
    """Have glibc keep the memory of freed buffers, of up to 32 MiB each, for this whole process.

    It would give a message's megabytes back to the system as each is freed, and take the next one's from there again, with a page fault
    for every 4 KiB of them. False where the C library is another one, which is left alone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEPT))
