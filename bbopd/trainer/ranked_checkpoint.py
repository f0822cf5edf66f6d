"""Checkpoints of a student that is split over ranks: each writes its slices while training goes on, and rank 0 makes them one folder.

In that folder there is ``shards/`` instead of the weights in ``model/`` and of ``optimizer.safetensors``; all else is as `checkpoint` says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed.checkpoint as dcp

from bbopd.errors import CheckpointError
from bbopd.modeling.load import quiet
from bbopd.trainer.checkpoint import SPARE_BYTES, generator_states, moment_bytes
from bbopd.trainer.checkpoint_files import begin_checkpoint, explained, publish_checkpoint
from bbopd.trainer.checkpoint_shards import write_shards
from bbopd.trainer.ranks import Ranks
from bbopd.trainer.stored import stored_bytes, write_description
from bbopd.trainer.write_points import reached

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RankedCheckpoints:
    """This rank's part of them, of ``model`` and ``optimizer``; ``whole`` is rank 0's whole student."""

    def __init__(self, ranks: Ranks, model: PreTrainedModel, whole: PreTrainedModel | None, optimizer: torch.optim.Optimizer) -> None:
        self._ranks, self._model, self._whole, self._optimizer = ranks, model, whole, optimizer
        self._writing: Future[Any] | None = None
        self._publisher = ThreadPoolExecutor(1, thread_name_prefix="bbopd-checkpoint")

    def begin(self, root: Path, step: int, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], keep: int) -> None:
        """Rank 0, while the others are in `join`: begin a checkpoint, which appears when all have written. See `save_checkpoint`.

        It holds weights, moments and ``state`` as they are now. Raises `CheckpointError` where this one cannot be begun, or the one before
        it could not be ended.
        """
        self.end()
        assert self._whole is not None, "only rank 0 is asked"
        needed = stored_bytes(self._model) + moment_bytes(self._optimizer) + SPARE_BYTES
        folder, aside = begin_checkpoint(root, step, needed)
        with explained(root, aside), quiet():
            write_description(self._whole, aside / "model")
            tokenizer.save_pretrained(aside / "model")
        reached("config")
        self._ranks.tell(do="save", folder=str(aside.absolute()))
        written, generators = self._write(aside)
        with explained(root, aside):
            saved = {"state": state, "generators": generators[0], "generators_of_others": generators[1:]}
            (aside / "state.json").write_text(json.dumps(saved, allow_nan=False))
        reached("state")
        self._writing = self._publisher.submit(_publish, written, folder, aside, step, keep)

    def join(self, aside: Path) -> None:
        """The other ranks: their part of what `begin` does."""
        with suppress(dcp.CheckpointException):  # rank 0 has it too, and says so
            self.end()
        self._writing, _ = self._write(aside)

    def end(self) -> None:
        """Wait for the one being written. Raises `CheckpointError` where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, aside: Path) -> tuple[Future[Any], Sequence[Any]]:
        with self._ranks.together():
            written = write_shards(aside, self._model, self._optimizer, self._ranks.checkpoints)
            reached("shards copied")
            return written, [record["generators"] for record in self._ranks.gather({"generators": generator_states()})]


def _publish(written: Future[Any], folder: Path, aside: Path, step: int, keep: int) -> None:
    try:
        written.result()
    except (dcp.CheckpointException, RuntimeError) as error:
        raise CheckpointError(f"the ranks could not write {folder}: {error}; earlier checkpoints are whole") from error
    reached("shards written")
    publish_checkpoint(folder, aside, step, keep)
