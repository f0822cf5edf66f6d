"""One optimizer step over several ranks: the same update as one process makes, from slices of the weights and shares of the tokens.

Rank 0 is called as any `Trainer` is, by the loop; it sends each rank its share of the micro-batches, and all do the same passes in
lock-step. The other ranks are in `RankedTrainer.follow`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.tensor import DTensor

from bbopd.errors import BbopdError, TrainingError
from bbopd.modeling import is_adapted, merged_weights, packed_attention, trained_weights
from bbopd.modeling.sharded import forget_pass, gathered_weights, shard_model, sharded_hidden
from bbopd.output_head import OutputHead
from bbopd.reference_vocabulary import refuse
from bbopd.trainer.checkpoint import load_sliced_moments, load_weights, read_state
from bbopd.trainer.checkpoint_files import SHARDS, verify_checkpoint
from bbopd.trainer.checkpoint_shards import read_shards
from bbopd.trainer.joined import JoinedBatch, gather_rows, join_batches, with_columns
from bbopd.trainer.optimizer import build_optimizer
from bbopd.trainer.ranked_checkpoint import RankedCheckpoints
from bbopd.trainer.ranks import Ranks
from bbopd.trainer.step import Gradients, StepMetrics, StepTokens, Trainer
from bbopd.trainer.stored import require_same_frozen
from bbopd.types import DistillBatch, DistillLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RankedTrainer(Trainer):
    """A `Trainer` whose model is split over ``ranks``; all of them make one, from the same model.

    Parameters
    ----------
    model
        float32, on the meta device, the same on every rank. It is sharded in place.
    whole
        Rank 0's own copy of the student, whose values are split, and which takes the weights that `weights` gathers; None on the others.
    merges
        Adapters leave `weights` merged into their matrices, as an engine with a plain model wants them; else as ``whole`` has them.
    checkpoint
        To go on from, one that `verify_checkpoint` has found whole, by any number of ranks. ``loaded`` is then the state that it was given.
    options
        As those of `Trainer`.

    Of a student with adapters these alone are gathered, saved and loaded; what is frozen is split too, and stays.

    Raises `CheckpointError` as `load_checkpoint` does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *arguments: Any,
        ranks: Ranks,
        whole: PreTrainedModel | None = None,
        merges: bool = True,
        checkpoint: Path | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, *arguments, **options)
        is_whole = checkpoint is not None and not (checkpoint / SHARDS).is_dir()
        if checkpoint is not None and whole is not None:
            if is_whole:
                load_weights(checkpoint, whole)
            else:
                require_same_frozen(whole, checkpoint / "model")
        shard_model(model, whole, ranks.mesh, self.train.parallel)
        self.optimizer = build_optimizer(model, self.train)
        if checkpoint is not None and is_whole:
            load_sliced_moments(checkpoint, model, self.optimizer)
        self.device = ranks.device
        self._ranks, self._whole = ranks, whole
        self._merges = merges and is_adapted(model)
        self.loaded: dict[str, Any] = {} if checkpoint is None else read_state(checkpoint, ranks.rank)
        if checkpoint is not None and not is_whole:
            self._load(checkpoint)
        self._checkpoints = RankedCheckpoints(ranks, model, whole, self.optimizer)
        self._linear = model.get_output_embeddings()
        self._is_split = self.train.parallel.head == "split"
        self.head = self._head_now()
        self._failure: BbopdError | None = None

    # ------------------------------------------------------------ rank 0

    def accumulate(self, micro_batches: Sequence[DistillBatch]) -> Gradients:
        """As `Trainer.accumulate`; the batch ``i`` goes to the rank ``i`` modulo their number.

        Raises `RankError` too, where another rank fails.
        """
        ranks, tokens = self._ranks, StepTokens.of(micro_batches)
        ranks.life.doing(f"at update {self.steps_done + 1}")
        shares = self._shares(micro_batches)
        with ranks.turn, ranks.together():
            place = {"planned_steps": self.planned_steps, "steps_done": self.steps_done}
            ranks.tell(do="accumulate", passes=len(shares[0]), tokens=asdict(tokens), **place)
            ranks.send(shares)
            gradients = self._share(shares[0], len(shares[0]), tokens)
            ranks.life.doing("between two updates")
            return gradients

    def update(self, gradients: Gradients) -> StepMetrics:
        """As `Trainer.update`, on all ranks."""
        with self._ranks.turn, self._ranks.together():
            self._ranks.tell(do="update")
            return super().update(gradients)

    def drop(self) -> None:
        """As `Trainer.drop`, on all ranks."""
        with self._ranks.turn:
            self._ranks.tell(do="drop")
            super().drop()

    def weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `Trainer.weights`; each tensor is gathered when its turn comes, into rank 0's whole student, whose own it is."""
        assert self._whole is not None, "only rank 0 is asked"
        own = trained_weights(self._whole)
        with self._ranks.turn:
            self._ranks.tell(do="weights")
            gathered = self._gathered()
            try:
                for name, tensor in gathered:
                    target = own[name].copy_(tensor)
                    if not self._merges:
                        yield name, target
            finally:
                deque(gathered, 0)  # the others gather all of them
        if self._merges:  # a matrix needs both of its adapters
            yield from merged_weights(self._whole, changed_only=changed_only)

    def save(self, root: Path, step: int, tokenizer: PreTrainedTokenizerBase, state: Mapping[str, Any], keep: int) -> None:
        """Begin a checkpoint of what the ranks hold now; training may go on. Raises `CheckpointError`, also of the one before."""
        with self._ranks.turn:
            self._checkpoints.begin(root, step, tokenizer, state, keep)

    def load(self, checkpoint: Path) -> None:
        """Put weights, moments and generators of all ranks back to a checkpoint in slices; ``loaded`` is its state. `CheckpointError`."""
        verify_checkpoint(checkpoint)
        with self._ranks.turn, self._ranks.together():
            self._ranks.tell(do="load", folder=str(checkpoint.absolute()))
            self._load(checkpoint)

    def end(self) -> None:
        """Wait for the checkpoint that is being written. Raises `CheckpointError`."""
        self._checkpoints.end()

    # ------------------------------------------------------------ the other ranks

    def follow(self) -> None:
        """Do what rank 0 says, until it ends the run. Raises `RankError` where it, or another rank, fails."""
        gradients: Gradients | None = None
        with self._ranks.together():
            while (order := self._ranks.hear())["do"] != "end":
                self._ranks.life.doing(f"told to {order['do']}, after update {self.steps_done},")
                match order["do"]:
                    case "accumulate":
                        self.planned_steps, self.steps_done = order["planned_steps"], order["steps_done"]
                        with suppress(TrainingError):  # rank 0 raises it too, and decides
                            gradients = self._share(self._ranks.receive(), order["passes"], StepTokens(**order["tokens"]))
                    case "update":
                        assert gradients is not None, "an update follows its gradients"
                        with suppress(TrainingError):
                            super().update(gradients)
                    case "drop":
                        super().drop()
                    case "weights":
                        deque(self._gathered(), 0)
                    case "load":
                        with suppress(CheckpointException):  # rank 0 has it too
                            self._checkpoints.end()
                        self._load(Path(order["folder"]))
                    case "save":
                        self._checkpoints.join(Path(order["folder"]))
            with suppress(CheckpointException):  # rank 0 has it too
                self._checkpoints.end()
            self._ranks.heed_end(order)

    # ------------------------------------------------------------ all of them, together

    def _shares(self, micro_batches: Sequence[DistillBatch]) -> list[Sequence[DistillBatch]]:
        """What each rank is sent: its own batches, or, of a head that is split, those of all, with its own columns of the teacher."""
        size = self._ranks.size
        if not self._is_split:
            return [micro_batches[rank::size] for rank in range(size)]
        rounds = [join_batches(micro_batches[first : first + size], size) for first in range(0, len(micro_batches), size)]
        rows = -(-self._linear.weight.shape[0] // size)
        return [[with_columns(batch, rank * rows, (rank + 1) * rows) for batch in rounds] for rank in range(size)]

    def _share(self, micro_batches: Sequence[DistillBatch], passes: int, tokens: StepTokens) -> Gradients:
        """This rank's passes of a step, ``passes`` in all: where it has fewer batches, others wait for its part of the collectives."""
        started = time.perf_counter()
        self._failure = None
        try:
            found = self._accumulate(micro_batches, tokens)
            for _ in range(passes - len(micro_batches)):
                self._empty_pass()
            records = self._ranks.gather(
                {
                    "error": None if self._failure is None else str(self._failure),
                    "totals": {name: total.item() for name, total in found.totals.items()},
                    "more": {name: figure.item() for name, figure in found.more.items()},
                }
            )
            self._raise_first([record["error"] for record in records])
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            forget_pass(self.model)
            raise
        records = records[:1] if self._is_split else records  # all have the loss of all
        totals = _together([record["totals"] for record in records])
        more = _together([record["more"] for record in records])
        return self._measured(replace(found, totals=totals, more=more), started)

    def _raise_first(self, errors: Sequence[str | None]) -> None:
        if self._failure is not None:
            raise self._failure
        for rank, error in enumerate(errors):
            if error is not None:
                raise TrainingError(f"on rank {rank}: {error}")

    def _hidden(self, batch: DistillBatch) -> Tensor:
        self._ranks.life.doing(f"in a pass of update {self.steps_done + 1}")
        ids, positions, boundaries = batch.input_ids, batch.position_ids, batch.boundaries
        if isinstance(batch, JoinedBatch):
            ids, positions, boundaries, _ = batch.own(self._ranks.rank)
        return sharded_hidden(self.model, ids, positions, boundaries)

    def _loss(self, hidden_PD: Tensor, head: OutputHead, batch: DistillBatch, *arguments: Any) -> DistillLoss:
        """A loss that cannot be had is held back as 0, with the error, until all passes are done: no rank may leave the others waiting."""
        head = self._head_now()
        try:
            if isinstance(batch, JoinedBatch):
                return self._joined_loss(hidden_PD, head, batch, *arguments)
            return super()._loss(hidden_PD, head, batch, *arguments)
        except BbopdError as error:
            self._failure = self._failure or error
            zero = torch.zeros((), device=self.device)
            return DistillLoss(_nothing(hidden_PD, head), zero, zero, {})

    def _joined_loss(self, hidden_PD: Tensor, head: OutputHead, batch: JoinedBatch, *arguments: Any) -> DistillLoss:
        group = self._ranks.mesh.get_group()
        *_, rows_n = batch.own(self._ranks.rank)
        hidden_ND = gather_rows(hidden_PD[rows_n].to(self.compute_dtype), batch.rows, group)
        everything = replace(batch, target_rows=torch.arange(len(hidden_ND), device=self.device))
        try:
            return super()._loss(hidden_ND, head, everything, *arguments)
        except BbopdError as error:
            refuse(group, error)  # the others are in the loss, or will be
            raise
        except ValueError as error:  # what another rank has refused
            raise TrainingError(str(error)) from error

    def _empty_pass(self) -> None:
        ids = torch.zeros(2, dtype=torch.int64, device=self.device)
        self.model.train()
        try:
            with packed_attention(self.model):
                with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
                    hidden_PD = sharded_hidden(
                        self.model, ids, torch.arange(2, device=self.device), torch.tensor([0, 2], dtype=torch.int32)
                    )
                    nothing = _nothing(hidden_PD, self._head_now())
                nothing.backward()
        finally:
            self.model.eval()

    def _head_now(self) -> OutputHead:
        """The head by its parameters of the moment: whole ones within a pass, slices between two."""
        weight_VD, bias = self._linear.weight, self._linear.bias
        if not self._is_split:
            return replace(self.head, weight_VD=weight_VD, bias=bias)
        own_bias = None if bias is None else bias.to_local()
        return replace(self.head, weight_VD=weight_VD.to_local(), bias=own_bias, group=self._ranks.mesh.get_group())

    def _norm(self) -> Tensor:
        norm = super()._norm()
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def _load(self, checkpoint: Path) -> None:
        read_shards(checkpoint, self.model, self.optimizer, self._ranks.checkpoints)
        self.loaded = read_state(checkpoint, self._ranks.rank)

    def _gathered(self) -> Iterator[tuple[str, Tensor]]:
        with self._ranks.together():
            yield from gathered_weights(self.model)


def _nothing(hidden_PD: Tensor, head: OutputHead) -> Tensor:
    """A loss of 0 that every parameter takes part in, as the sums over ranks are of all gradients."""
    parts = (hidden_PD, head.weight_VD, head.bias)
    return torch.stack([0.0 * part.float().sum() for part in parts if part is not None]).sum()


def _together(records: Sequence[Mapping[str, float]]) -> dict[str, Tensor]:
    """Figures of all ranks as one: sums, but the largest of what ends in ``_max``."""
    names = dict.fromkeys(name for record in records for name in record)
    found = {name: [record[name] for record in records if name in record] for name in names}
    return {
        name: torch.tensor(max(values) if name.endswith("_max") else sum(values), dtype=torch.float64) for name, values in found.items()
    }
