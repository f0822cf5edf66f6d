"""All that a run trains and counts, into its checkpoints and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from bbopd.config import RunConfig
from bbopd.errors import CheckpointError
from bbopd.pipeline.folder import COPIED, RunFolder
from bbopd.pipeline.state import RunState
from bbopd.trainer.checkpoint import latest_checkpoint, load_beside, load_checkpoint, save_checkpoint
from bbopd.trainer.checkpoint_files import SHARDS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from bbopd.pipeline.adversary import Adversary
    from bbopd.trainer.average import WeightAverage
    from bbopd.trainer.checkpoint_store import CheckpointStore
    from bbopd.trainer.ranked import RankedTrainer
    from bbopd.trainer.step import Trainer

_AVERAGE = "average"  # the file of a checkpoint that holds it


class RunCheckpoints:
    """Those of one run, in ``folder``.

    Parameters
    ----------
    ranked
        The trainer again, where it is one of several ranks; it has then read the checkpoint that it was made with.
    keep
        How many.
    retries
        How often a teacher has been asked again in this session.
    store
        Where each is copied to; ``note`` hears where it could not be.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        trainer: Trainer,
        ranked: RankedTrainer | None,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        adversary: Adversary | None,
        average: WeightAverage | None,
        keep: int,
        retries: Callable[[], int],
        store: CheckpointStore | None = None,
        note: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._store, self._note = store, note
        self._folder, self._keep = folder, keep
        self._trainer, self._ranked, self._model, self._tokenizer = trainer, ranked, model, tokenizer
        self._adversary, self._average = adversary, average
        self._retries, self._retries_before = retries, 0

    def begin(self, checkpoint: Path | None) -> RunState:
        """The state that a run begins with: that of ``checkpoint``, with all else as it was there. Raises `CheckpointError`."""
        if checkpoint is None:
            return RunState()
        state = self._load(checkpoint)
        self._retries_before = state.teacher_retries
        return state

    def can_roll_back_to(self, checkpoint: Path | None) -> bool:
        """Several ranks go back within a run to slices alone, which they have written themselves."""
        return checkpoint is not None and (self._ranked is None or (checkpoint / SHARDS).is_dir())

    def roll_back(self) -> RunState:
        """Put all that is trained back to the last whole checkpoint, and return its state. Raises `CheckpointError`."""
        if self._ranked is not None:
            self._ranked.end()
        checkpoint = latest_checkpoint(self._folder.checkpoints)
        if checkpoint is None:
            raise CheckpointError(f"there is no checkpoint in {self._folder.checkpoints} any more to go back to: start the run again")
        if self._ranked is not None:
            self._ranked.load(checkpoint)
        return self._load(checkpoint)

    def save(self, now: RunState) -> None:
        """Write a checkpoint; of several ranks, begin to. Raises `CheckpointError`."""
        self._folder.require()
        now.teacher_retries = self._retries_before + self._retries()
        if self._store is not None and (error := self._store.end()) is not None:  # before what is being copied may be removed here
            self._note(f"{error}; the next one is tried")
        self._write(now)
        if self._store is not None:
            if self._ranked is not None:
                self._ranked.end()
            checkpoint = latest_checkpoint(self._folder.checkpoints)
            assert checkpoint is not None, "it was written just now"
            self._store.begin(checkpoint, [self._folder.root / name for name in COPIED])

    @contextmanager
    def copied(self) -> Iterator[None]:
        """Wait at the end for the copy being made. Raises `CheckpointError` where it cannot be, and nothing else has gone wrong."""
        yield
        if self._store is not None and (error := self._store.end()) is not None:
            raise error

    def _write(self, now: RunState) -> None:
        root = self._folder.checkpoints
        if self._ranked is not None:
            self._ranked.save(root, now.step, self._tokenizer, now.to_json(), self._keep)
            return
        save_checkpoint(
            root,
            now.step,
            model=self._model,
            tokenizer=self._tokenizer,
            optimizer=self._trainer.optimizer,
            state=now.to_json(),
            keep=self._keep,
            beside=self._beside(),
        )

    def _load(self, checkpoint: Path) -> RunState:
        if self._ranked is None:
            loaded = load_checkpoint(checkpoint, model=self._model, optimizer=self._trainer.optimizer)
        else:
            loaded = self._ranked.loaded
        state = RunState.from_json(loaded)
        beside = {} if self._adversary is None and self._average is None else load_beside(checkpoint)
        if self._adversary is not None:
            self._adversary.load_tensors(beside)
        if self._average is not None:
            self._average.load_tensors(beside, _AVERAGE)
        self._trainer.steps_done = state.step
        return state

    def _beside(self) -> Mapping[str, Mapping[str, Tensor]]:
        held: Mapping[str, Mapping[str, Tensor]] = {} if self._adversary is None else self._adversary.tensors()
        return held if self._average is None else {**held, _AVERAGE: self._average.tensors()}


def open_store(config: RunConfig, note: Callable[[str], None]) -> CheckpointStore | None:
    """Where checkpoints are copied to; a run whose folder has none is given the latest from there.

    Raises `ConfigError` for a store that cannot be opened, and `CheckpointError` for one that cannot be read.
    """
    if config.train.checkpoint_store is None:
        return None
    from bbopd.trainer.checkpoint_store import CheckpointStore

    store, folder = CheckpointStore(config.train.checkpoint_store, config.train.keep_checkpoints), RunFolder(Path(config.output))
    if latest_checkpoint(folder.checkpoints) is None and (name := store.fetch(folder.root)) is not None:
        note(f"{name} was brought from {config.train.checkpoint_store}")
    return store
