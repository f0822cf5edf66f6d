"""Which weights a figure belongs to."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def weights_sha256(model: PreTrainedModel) -> str:
    """SHA-256 as lowercase hex over name, dtype, shape and bits of every parameter, in the order of names; a tied weight counts once."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
