"""Checkpoints that a crash cannot spoil: written aside, synced, renamed, and only then named by ``latest``.

Layout, below the root of a run's checkpoints::

    latest                      one line: the folder to resume from
    step-00000100/
        model/                  Hugging Face format, or PEFT's where adapters are trained, with the tokenizer
        optimizer.safetensors   AdamW moments, keys ``<moment>/<parameter name>``
        <name>.safetensors      what else a run trains or keeps beside the model
        state.json              the caller's counters, and the random number generators
        manifest.json           size and CRC-32 of every other file; written last

Where several ranks have written it, ``shards/`` holds the weights and moments (`checkpoint_shards`); `load_checkpoint` reads either.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from bbopd.errors import CheckpointError
from bbopd.modeling.load import quiet
from bbopd.trainer.checkpoint_files import (
    LATEST,
    MANIFEST,
    SHARDS,
    begin_checkpoint,
    checkpoint_folders,
    explained,
    publish_checkpoint,
    verify_checkpoint,
    way_out,
)
from bbopd.trainer.optimizer import load_optimizer_tensors, optimizer_tensors, takes_moments
from bbopd.trainer.stored import model_bytes, read_model, require_same_frozen, stored_bytes, stored_tensors, write_model
from bbopd.trainer.write_points import reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_BYTES = 16 * 2**20  # tokenizer, JSON, file system


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
    beside: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write a checkpoint, point ``latest`` at it, and drop all but the newest ``keep``.

    Parameters
    ----------
    state
        Whatever JSON can hold: counters, data position. The generators of torch, Python and NumPy are added.
    beside
        Tensors of other models than the one that is trained, by the name of the file that shall hold them; `load_beside` reads them.

    Returns
    -------
    Path
        The new folder. A step saved twice gets a folder of its own each time, so no moment is without a whole checkpoint.

    Raises
    ------
    CheckpointError
        Too little disk space (said before anything is written), or the disk refuses. Earlier checkpoints stay as they are.
    """
    needed = stored_bytes(model) + moment_bytes(optimizer) + SPARE_BYTES
    needed += sum(tensor.nbytes for tensors in (beside or {}).values() for tensor in tensors.values())
    folder, aside = begin_checkpoint(root, step, needed)
    with explained(root, aside):
        write_model(model, aside / "model")
        reached("model")
        with quiet():
            tokenizer.save_pretrained(aside / "model")
        reached("tokenizer")
        save_file(optimizer_tensors(model, optimizer), aside / "optimizer.safetensors")
        reached("moments")
        for name, tensors in (beside or {}).items():
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, aside / f"{name}.safetensors")
        reached("beside")
        (aside / "state.json").write_text(json.dumps({"state": state, "generators": generator_states()}, allow_nan=False))
    reached("state")
    publish_checkpoint(folder, aside, step, keep)
    return folder


def require_space(root: Path, *, model: PreTrainedModel, keep: int, beside: int = 0) -> None:
    """Refuse a run whose checkpoints will not fit on the disk, before anything is spent on it.

    Asked for is room for ``keep`` checkpoints and the one being written beside them, each of the weights, two float32 moments of what is
    trained, ``beside`` bytes of other models, and some MiB for the rest; those already below ``root`` have their room. The model at the end
    has that of the checkpoint being written, and more where checkpoints hold adapters alone. Nothing is written, and ``root`` need not
    exist.

    Raises
    ------
    CheckpointError
        Too little free space, or none to be asked about.
    """
    one = checkpoint_bytes(model, beside)
    with explained(root):
        folders = max(1, keep + 1 - len(checkpoint_folders(root)))
        disk = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
        free = shutil.disk_usage(disk).free
    needed = folders * one + max(0, model_bytes(model) - one)
    if free < needed:
        raise CheckpointError(
            f"the disk of {root} has {free:,} bytes free, and {folders} more checkpoints of {one:,} bytes (train.keep_checkpoints {keep}, "
            f"and one being written), and the model at the end, need {needed:,}: free some space, lower train.keep_checkpoints, "
            "or set output to another disk"
        )


def checkpoint_bytes(model: PreTrainedModel, beside: int = 0) -> int:
    """Of one checkpoint of ``model``, which may be on the meta device, with two float32 moments and ``beside`` bytes of other models."""
    moments = 2 * sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return stored_bytes(model) + moments + beside + SPARE_BYTES


def load_checkpoint(folder: Path, *, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Put model, optimizer and random number generators back as they were, and return the caller's state.

    Raises
    ------
    CheckpointError
        A file is missing, cut short or altered, or belongs to another model. Model and optimizer are untouched.
    """
    verify_checkpoint(folder)
    if (folder / SHARDS).is_dir():
        from bbopd.trainer.checkpoint_shards import read_shards

        with _readable(folder):
            require_same_frozen(model, folder / "model")
        read_shards(folder, model, optimizer)
        return read_state(folder)
    source = _read_weights(folder, model)
    with _readable(folder):
        moments = load_file(folder / "optimizer.safetensors")
    _check_moments(folder, model, optimizer, moments)
    _copy_weights(source, model)
    load_optimizer_tensors(model, optimizer, moments)
    return read_state(folder)


def load_weights(folder: Path, model: PreTrainedModel) -> None:
    """Put the weights back that a checkpoint of one process holds. Raises `CheckpointError`; the model is then untouched."""
    _copy_weights(_read_weights(folder, model), model)


def load_sliced_moments(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Give the optimizer of a model that is split over ranks its slices of a checkpoint of one process, reading one tensor at a time.

    Raises `CheckpointError`.
    """
    from bbopd.trainer.checkpoint_shards import sliced

    with _readable(folder), safe_open(folder / "optimizer.safetensors", "pt") as file:
        keys = list(file.keys())
        _check_moments(folder, model, optimizer, dict.fromkeys(keys))
        load_optimizer_tensors(model, optimizer, {key: sliced(model, key, file.get_tensor(key)) for key in keys})


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); {way_out(folder)}") from error


def _read_weights(folder: Path, model: PreTrainedModel) -> Mapping[str, Tensor]:
    with _readable(folder):
        source = read_model(model, folder / "model")
    if {k: v.shape for k, v in source.items()} != {k: v.shape for k, v in stored_tensors(model).items()}:
        _refuse_model(folder)
    return source


@torch.no_grad()
def _copy_weights(source: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    for name, tensor in stored_tensors(model).items():
        tensor.copy_(source[name])


def _check_moments(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, moments: Mapping[str, object]) -> None:
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not {key.partition("/")[2] for key in moments} <= names:
        _refuse_model(folder)
    if not takes_moments(optimizer, moments):
        raise CheckpointError(f"{folder} holds the moments of another optimizer: set train.optimizer back, or output to a new folder")


def _refuse_model(folder: Path) -> NoReturn:
    raise CheckpointError(f"{folder} holds another model than the one to be trained: set output to a new folder, or student.model back")


def read_state(folder: Path, rank: int = 0) -> dict[str, Any]:
    """The caller's state in a checkpoint that was proved whole; puts the random number generators back that ``rank`` had there, if any."""
    saved = json.loads((folder / "state.json").read_text())
    generators = [saved["generators"], *saved.get("generators_of_others", ())]
    if rank < len(generators):
        _restore_generators(generators[rank])
    return dict(saved["state"])


def load_beside(folder: Path) -> dict[str, dict[str, Tensor]]:
    """What `save_checkpoint` was given as ``beside``; `load_checkpoint` has proved the files whole. Raises `CheckpointError`."""
    try:
        return {path.stem: load_file(path) for path in sorted(folder.glob("*.safetensors")) if path.stem != "optimizer"}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}); {way_out(folder)}") from error


def latest_checkpoint(root: Path) -> Path | None:
    """The checkpoint to resume from: what ``latest`` names, or the newest whole one where that is gone; None without any."""
    if not root.is_dir():
        return None
    pointer = root / LATEST
    if pointer.is_file():
        try:
            folder = root / pointer.read_text().strip()
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{pointer} cannot be read ({error}): remove it to resume from the newest checkpoint in {root}"
            ) from error
        if (folder / MANIFEST).is_file() and folder.parent == root:
            return folder
    return next((folder for folder in reversed(checkpoint_folders(root)) if (folder / MANIFEST).is_file()), None)


# ---------------------------------------------------------------- contents


def moment_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(value.nbytes for entry in optimizer.state.values() for value in entry.values() if isinstance(value, Tensor))


def generator_states() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    legacy = np.random.get_state(legacy=False)
    return {
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "cuda": [base64.b64encode(one.numpy().tobytes()).decode() for one in torch.cuda.get_rng_state_all()]
        if torch.cuda.is_available()
        else [],
        "python": [version, list(internal), gauss],
        "numpy": {**legacy, "state": {**legacy["state"], "key": legacy["state"]["key"].tolist()}},
    }


def _restore_generators(states: dict[str, Any]) -> None:
    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)

    torch.set_rng_state(tensor(states["torch"]))
    if torch.cuda.is_available() and len(states["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([tensor(one) for one in states["cuda"]])
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    legacy = states["numpy"]
    np.random.set_state({**legacy, "state": {**legacy["state"], "key": np.array(legacy["state"]["key"], dtype=np.uint32)}})
