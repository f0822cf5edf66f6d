"""What the machine can do, as far as a choice depends on it."""

from __future__ import annotations

from functools import cache


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
