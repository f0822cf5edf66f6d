"""AdamW over float32 master weights, its moments in 32 bits or in 8, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bbopd.config import TrainConfig
from bbopd.errors import ModelError
from bbopd.extras import need
from bbopd.modeling.quantized import muted

MOMENT_BYTES = {"adamw": 8, "adamw_8bit": 2}
"""Of a trained parameter's two moments, by `TrainConfig.optimizer`; scales left out."""

_TABLES = ("qmap1", "qmap2")  # what codes of eight bits mean: one tensor for all parameters, which a file takes once a name


def parameter_groups(model: nn.Module, train: TrainConfig) -> list[dict[str, Any]]:
    """Two AdamW groups: decayed, and exempt.

    ``biases_and_norms`` exempts everything that is no matrix; embeddings are matrices. ``biases``, the literal recipe, exempts biases
    alone, so norms decay. A tied weight appears once; frozen ones not at all.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_bias = name.endswith("bias") and parameter.ndim < 2
        is_exempt = is_bias if train.decay_exempt == "biases" else parameter.ndim < 2
        (exempt if is_exempt else decayed).append(parameter)
    return [{"params": decayed, "weight_decay": train.weight_decay}, {"params": exempt, "weight_decay": 0.0}]


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019); the learning rate is set anew before every update.

    ``train.optimizer`` adamw is PyTorch's fused form. adamw_8bit is that of bitsandbytes: moments of weights from 4,096 entries on
    are kept in eight bits, by blocks of 256 (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2).

    Raises
    ------
    ConfigError
        bitsandbytes is asked for and not installed.
    ModelError
        A trainable weight that is not float32: small updates would be lost to rounding.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(f"weight {name} is {parameter.dtype}; training keeps float32 masters: load the model with dtype=torch.float32")
    groups = [group for group in parameter_groups(model, train) if group["params"]]
    if train.optimizer == "adamw_8bit":
        with muted():
            bitsandbytes = need("bitsandbytes", "train.optimizer adamw_8bit", extra="quantize")
        eight_bits: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=train.lr, betas=train.betas, eps=train.eps)
        return eight_bits
    is_empty = any(parameter.is_meta for parameter in model.parameters())  # which the fused form refuses
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=not is_empty)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What ``optimizer`` knows of ``model``'s weights, keys ``<moment>/<parameter name>``; counts that are plain numbers as int64."""
    return {
        f"{moment}/{name}": _as_tensor(moment, value)
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def _as_tensor(moment: str, value: Tensor | int) -> Tensor:
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return value.clone() if moment in _TABLES else value.contiguous()


def takes_moments(optimizer: torch.optim.Optimizer, moments: Iterable[str]) -> bool:
    """Whether `optimizer_tensors` may have given ``moments``, its keys, of an optimizer of this kind."""
    names = {key.partition("/")[0] for key in moments}
    return not names or ("exp_avg" in names) == isinstance(optimizer, torch.optim.AdamW)


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put ``optimizer`` back to where `optimizer_tensors` gave ``moments``."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        is_number = value.dtype == torch.int64
        optimizer.state[parameters[name]][moment] = int(value) if is_number else value.to(parameters[name].device)
