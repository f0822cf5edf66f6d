"""Weights and moments of a student in as many files as ranks wrote, to be read by any number of them: torch's distributed checkpoints.

The files are safetensors with each slice's place in their header; nothing is pickled. Keys are ``model/<parameter>`` and
``<moment>/<parameter>``.
"""

from __future__ import annotations

import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, distribute_tensor

from bbopd.errors import CheckpointError
from bbopd.modeling import trained_weights
from bbopd.trainer.checkpoint_files import SHARDS, way_out
from bbopd.trainer.optimizer import load_optimizer_tensors, optimizer_tensors, takes_moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from transformers import PreTrainedModel

_MODEL = "model"


def write_shards(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, group: ProcessGroup) -> Future[Any]:
    """Copy what this rank trains, and have it written below ``folder`` while training goes on. All ranks of ``group`` call it.

    Each rank's future ends when all have written, or raises where one could not.
    """
    tensors: dict[str, Tensor] = {f"{_MODEL}/{name}": parameter for name, parameter in trained_weights(model).items()}
    tensors |= optimizer_tensors(model, optimizer)
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    begun = dcp.async_save(tensors, storage_writer=writer, process_group=group)
    assert isinstance(begun, Future), "the writer stages by itself"
    return begun


def read_shards(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, group: ProcessGroup | None = None) -> None:
    """Put weights and moments back as they were, of a model that is split over ``group``, whose ranks all call it, or of a whole one.

    Raises `CheckpointError` for shards of another model or optimizer; both are then untouched.
    """
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    stored = {key: tuple(entry.size) for key, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
    parameters = trained_weights(model)
    shapes = {f"{_MODEL}/{name}": tuple(parameter.shape) for name, parameter in parameters.items()}
    moments = {key: shape for key, shape in stored.items() if key not in shapes}
    fits = {key: stored.get(key) for key in shapes} == shapes and {key.partition("/")[2] for key in moments} <= parameters.keys()
    if not fits:
        raise CheckpointError(f"{folder} holds another model than the one to be trained: set output to a new folder, or student.model back")
    empty = {key: _empty(parameters[key.partition("/")[2]], shape) for key, shape in moments.items()}
    if not takes_moments(optimizer, empty):
        raise CheckpointError(f"{folder} holds the moments of another optimizer: set train.optimizer back, or output to a new folder")
    wanted = {f"{_MODEL}/{name}": parameter for name, parameter in parameters.items()} | empty
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of a single process
            dcp.load(wanted, storage_reader=reader, process_group=group, no_dist=group is None)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); {way_out(folder)}") from error
    load_optimizer_tensors(model, optimizer, empty)


def sliced(model: PreTrainedModel, key: str, moment: Tensor) -> Tensor:
    """This rank's slice of a whole ``moment``, which `optimizer_tensors` has called ``key``; itself where it is no weight's like."""
    parameter = model.get_parameter(key.partition("/")[2])
    if not isinstance(parameter, DTensor) or moment.shape != parameter.shape:
        return moment
    return distribute_tensor(moment, parameter.device_mesh, parameter.placements, src_data_rank=None).clone()  # the whole is let go


def _empty(parameter: Tensor, shape: tuple[int, ...]) -> Tensor:
    """For a moment: as the parameter is where it has the same shape, else plain, as counts of steps are."""
    return torch.zeros_like(parameter) if shape == tuple(parameter.shape) else torch.zeros(shape)
