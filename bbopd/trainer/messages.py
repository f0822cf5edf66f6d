"""A packed batch on its way to another rank: one JSON description, and its tensors as bytes. Nothing is pickled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from bbopd.trainer.joined import JoinedBatch
from bbopd.types import CandidateTeacher, DistillBatch, FullTeacher, SampledTeacher, SpanTeacher, TopKTeacher

_KINDS = {
    kind.__name__: kind for kind in (DistillBatch, JoinedBatch, FullTeacher, TopKTeacher, CandidateTeacher, SampledTeacher, SpanTeacher)
}


def describe(value: Any, tensors: list[Tensor]) -> Any:
    """``value`` as JSON: a batch, what it holds, or a list of batches. Its tensors are appended to ``tensors``, as contiguous bytes."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().contiguous().view(-1).view(torch.uint8))
        return {"dtype": str(value.dtype).removeprefix("torch."), "shape": list(value.shape)}
    if is_dataclass(value):
        return {"kind": type(value).__name__, "fields": {f.name: describe(getattr(value, f.name), tensors) for f in fields(value)}}
    if isinstance(value, list):
        return [describe(one, tensors) for one in value]
    return value


def rebuild(described: Any, tensors: Iterator[Tensor]) -> Any:
    """What `describe` was given, from its description and its tensors in their order."""
    if isinstance(described, list):
        return [rebuild(one, tensors) for one in described]
    if not isinstance(described, dict):
        return described
    if "kind" in described:
        return _KINDS[described["kind"]](**{name: rebuild(value, tensors) for name, value in described["fields"].items()})
    return next(tensors).view(_dtype(described)).view(described["shape"])


def buffers(described: Any) -> Iterator[Tensor]:
    """Empty bytes for each tensor of a description, in the order of `describe`."""
    if isinstance(described, list):
        for one in described:
            yield from buffers(one)
    elif isinstance(described, dict) and "kind" in described:
        for value in described["fields"].values():
            yield from buffers(value)
    elif isinstance(described, dict):
        yield torch.empty(prod(described["shape"]) * _dtype(described).itemsize, dtype=torch.uint8)


def _dtype(described: dict[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, described["dtype"])
    return dtype
