"""What the machine can do, as far as a choice depends on it."""

from __future__ import annotations

import os
from functools import cache

LEVELS = ("portable", "avx2", "avx512", "avx512_bf16", "amx_bf16")
"""Instruction sets that there are C++ kernels for; ``BBOPD_CPU_LEVEL`` sets the highest that may be used."""


def allowed_level(best: str) -> str:
    """``best``, or ``BBOPD_CPU_LEVEL`` where that is lower."""
    asked = os.environ.get("BBOPD_CPU_LEVEL", best)
    if asked not in LEVELS:
        raise ValueError(f"BBOPD_CPU_LEVEL is {asked!r}: choose one of {', '.join(LEVELS)}")
    return min(best, asked, key=LEVELS.index)


@cache
def cpu_features() -> dict[str, bool]:
    """Instruction sets that the processor and the operating system allow: avx2, avx512, avx512_bf16, amx_bf16."""
    from bbopd._C import cpu_features as detect

    return dict(detect())


def multiplies_bfloat16(device_type: str) -> bool:
    """Whether bfloat16 matrix products run in hardware on ``"cpu"`` or ``"cuda"``, rather than being emulated."""
    if device_type == "cuda":
        import torch

        return torch.cuda.get_device_capability()[0] >= 8
    features = cpu_features()
    return features["avx512_bf16"] or features["amx_bf16"]
