"""AdamW over float32 master weights, with weight decay where it belongs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bbopd.config import TrainConfig
from bbopd.errors import ModelError


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


def build_optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) in its fused form; the learning rate is set anew before every update.

    Raises
    ------
    ModelError
        A trainable weight that is not float32: small updates would be lost to rounding.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ModelError(f"weight {name} is {parameter.dtype}; training keeps float32 masters: load the model with dtype=torch.float32")
    groups = [group for group in parameter_groups(model, train) if group["params"]]
    return torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True)


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What ``optimizer`` knows of ``model``'s weights, keys ``<moment>/<parameter name>``."""
    return {
        f"{moment}/{name}": value.contiguous()
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put ``optimizer`` back to where `optimizer_tensors` gave ``moments``."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for key, value in moments.items():
        moment, _, name = key.partition("/")
        optimizer.state[parameters[name]][moment] = value.to(parameters[name].device)
