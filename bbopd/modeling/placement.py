"""Where tensors live."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")


def to_device(item: Item, device: torch.device) -> Item:
    """The same tensor or frozen dataclass with its tensors, and those of the dataclasses in it, on ``device``; all else as it is."""
    moved: Any = item
    if isinstance(item, Tensor):
        moved = item.to(device, non_blocking=device.type == "cuda")  # a copy to the CPU must be waited for
    elif dataclasses.is_dataclass(item) and not isinstance(item, type):
        moved = dataclasses.replace(item, **{f.name: to_device(getattr(item, f.name), device) for f in dataclasses.fields(item)})
    return moved
