"""What a checkpoint holds of a model: all weights in Hugging Face format, or, of one with adapters, these alone in PEFT's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bbopd.errors import CheckpointError
from bbopd.modeling import adapter_parameters, is_adapted, plain_sizes, save_adapter
from bbopd.modeling.load import quiet
from bbopd.modeling.lora import read_adapter, save_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FROZEN = "frozen.json"
_FLOAT32_BYTES = 4
_sums: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()


def stored_bytes(model: PreTrainedModel) -> int:
    """Of what `write_model` writes, about."""
    return _adapter_bytes(model) if is_adapted(model) else model_bytes(model)


def model_bytes(model: PreTrainedModel) -> int:
    """Of all weights and buffers, adapters merged, in float32: what a run leaves as its result. A tied weight counts once."""
    everything = _FLOAT32_BYTES * sum(plain_sizes(model)) + sum(buffer.nbytes for buffer in model.buffers())
    return everything - _adapter_bytes(model) if is_adapted(model) else everything


def _adapter_bytes(model: PreTrainedModel) -> int:
    return sum(parameter.nbytes for parameter in adapter_parameters(model).values())


def stored_tensors(model: PreTrainedModel) -> Mapping[str, Tensor]:
    """The model's own tensors that a checkpoint holds, by the names in it."""
    if is_adapted(model):
        return {name: parameter.detach() for name, parameter in adapter_parameters(model).items()}
    return model.state_dict()


def write_model(model: PreTrainedModel, folder: Path) -> None:
    """Raises OSError or SafetensorError."""
    with quiet():
        if not is_adapted(model):
            model.save_pretrained(folder)
            return
        save_adapter(model, folder)
    _write_frozen(model, folder)


def write_description(model: PreTrainedModel, folder: Path) -> None:
    """What `write_model` writes beside tensors, which are elsewhere. Raises OSError."""
    if not is_adapted(model):
        model.config.save_pretrained(folder)
        return
    save_adapter_config(model, folder)
    _write_frozen(model, folder)


def require_same_frozen(model: PreTrainedModel, folder: Path) -> None:
    """Raises `CheckpointError` where adapters in ``folder`` belong to other frozen weights than the model's, OSError and ValueError."""
    if is_adapted(model) and json.loads((folder / _FROZEN).read_text())["sha256"] != _frozen_sha256(model):
        raise CheckpointError(
            f"the adapters in {folder} were trained beside other frozen weights than those of student.model: "
            "set output to a new folder, or student.model, student.revision, student.init and student.quantize back"
        )


def _write_frozen(model: PreTrainedModel, folder: Path) -> None:
    (folder / _FROZEN).write_text(json.dumps({"sha256": _frozen_sha256(model)}))


def read_model(model: PreTrainedModel, folder: Path) -> Mapping[str, Tensor]:
    """What `write_model` wrote of a model of the same kind, by the names of `stored_tensors`.

    Raises OSError, ValueError or SafetensorError; `CheckpointError` where adapters belong to other frozen weights than the model's.
    """
    if not is_adapted(model):
        with quiet():
            return type(model).from_pretrained(folder, dtype=model.dtype).state_dict()
    require_same_frozen(model, folder)
    return read_adapter(model, folder)


def _frozen_sha256(model: PreTrainedModel) -> str:
    """Over names, shapes and the sums of the frozen weights' bits, which are added up where they lie."""
    if model not in _sums:
        digest = hashlib.sha256()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                bits = parameter.detach().contiguous()
                bits = (bits if bits.itemsize == 1 else bits.view(torch.int16)).sum(dtype=torch.int64)
                digest.update(f"{name} {tuple(parameter.shape)} {int(bits)}\n".encode())
        _sums[model] = digest.hexdigest()
    return _sums[model]
