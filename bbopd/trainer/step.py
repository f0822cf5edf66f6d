"""One optimizer step: packed micro-batches forward, fused loss, backward, a checked update, and what to report of it.

Shape suffixes: ``P`` packed tokens, ``N`` response tokens (rows of the loss), ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.errors import TrainingError
from bbopd.modeling import merged_weights, output_head, packed_attention, packed_hidden, to_device
from bbopd.objectives import Objective
from bbopd.objectives.base import Scheduled
from bbopd.output_head import OutputHead
from bbopd.trainer.average import WeightAverage
from bbopd.trainer.optimizer import build_optimizer
from bbopd.trainer.schedules import learning_rate_at, loss_weights_at
from bbopd.types import IGNORE_INDEX, DistillBatch, DistillLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """What one update did. Losses are nats a token, means over the valid tokens of the whole step."""

    step: int  # updates done, this one included
    loss: float
    ce: float  # before its weight; 0 without labels
    kd: float  # before its weight, with T² where the objective scales by it; 0 without a signal
    lr: float
    grad_norm: float  # before clipping
    ce_weight: float
    kd_weight: float
    tokens: int  # response tokens
    labelled_tokens: int  # those with a label: CE's mean is over them
    signal_tokens: int  # those with a teacher's signal: KD's mean is over them
    rollout_tokens: int  # those that the student wrote
    packed_tokens: int  # prompts included
    seconds: float
    teacher_tail_mass: float | None  # mean mass outside the teacher's ids; None where it gives whole distributions
    floored: int  # logprobs of the teacher that a reverse term read as their floor
    more: Mapping[str, float] = field(default_factory=dict)  # what else the objective tells: see `_more`


@dataclass(frozen=True, slots=True)
class StepTokens:
    """Tokens of a whole step; of the names, see `StepMetrics`."""

    tokens: int
    labelled_tokens: int
    signal_tokens: int
    rollout_tokens: int
    packed_tokens: int

    @classmethod
    def of(cls, micro_batches: Sequence[DistillBatch]) -> StepTokens:
        return cls(
            tokens=sum(batch.response_tokens for batch in micro_batches),
            labelled_tokens=sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in micro_batches),
            signal_tokens=sum(map(_signalled_tokens, micro_batches)),
            rollout_tokens=sum(batch.rollout_tokens for batch in micro_batches),
            packed_tokens=sum(batch.packed_tokens for batch in micro_batches),
        )


@dataclass(frozen=True, slots=True, eq=False)
class Gradients:
    """What `Trainer.accumulate` has found; the gradients themselves are with the parameters. ``loss`` and ``grad_norm`` may be NaN."""

    tokens: StepTokens
    totals: Mapping[str, Tensor]
    more: Mapping[str, Tensor]
    ce_weight: float
    kd_weight: float
    loss: float = 0.0
    grad_norm: float = 0.0  # before clipping
    seconds: float = 0.0


class Trainer:
    """Holds a model, its optimizer and its place in the schedules; between steps the model is in eval mode, ready to generate.

    Parameters
    ----------
    model
        float32 causal language model, trained in place.
    objective
        Gives the loss of a batch.
    planned_steps
        Length of the run, for schedules given as fractions.
    compute_dtype
        torch.bfloat16 multiplies matrices in bfloat16 by autocast; masters and optimizer stay float32.
    vocab_size
        Logits from there on only pad the head: they have no probability and no gradient. None: all are of tokens.
    activation_checkpointing
        Keep only layer inputs and run each layer again in the backward pass.
    average
        Follows the weights after every update.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        train: TrainConfig,
        objective_config: ObjectiveConfig,
        planned_steps: int,
        compute_dtype: torch.dtype = torch.float32,
        vocab_size: int | None = None,
        activation_checkpointing: bool = False,
        average: WeightAverage | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.train = train
        self.objective_config = objective_config
        self.planned_steps = planned_steps
        self.compute_dtype = compute_dtype
        self.device = model.device
        self.optimizer = build_optimizer(model, train)
        self.average = average
        self.head = output_head(model, vocab_size)
        self.steps_done = 0
        if activation_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.eval()

    def train_step(self, micro_batches: Sequence[DistillBatch]) -> StepMetrics:
        """Update the weights once on all of ``micro_batches``; how the tokens are split over them does not change the update.

        Raises
        ------
        TrainingError
            The loss or the gradient is NaN or infinite. Weights and optimizer are as they were before the call.
        """
        return self.update(self.accumulate(micro_batches))

    def accumulate(self, micro_batches: Sequence[DistillBatch]) -> Gradients:
        """The first, long part of `train_step`: weights are read, not changed. `update` or `drop` must follow, with what this returns."""
        started = time.perf_counter()
        return self._measured(self._accumulate(micro_batches, StepTokens.of(micro_batches)), started)

    def _accumulate(self, micro_batches: Sequence[DistillBatch], tokens: StepTokens) -> Gradients:
        """Of a step of ``tokens``, to which ``micro_batches`` belong; not measured yet."""
        ce_weight, kd_weight = loss_weights_at(self.steps_done, self.planned_steps, self.objective_config)
        normalizer = (float(max(1, tokens.labelled_tokens)), float(max(1, tokens.signal_tokens)))
        totals: defaultdict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        more: dict[str, Tensor] = {}
        self.model.train()
        try:
            for micro_batch in micro_batches:
                signal = _signalled_tokens(micro_batch)
                batch = to_device(micro_batch, self.device)
                result = self._backward(batch, ce_weight, kd_weight, normalizer)
                totals["loss"] += result.loss.detach()
                totals["ce"] += (result.ce * batch.token_weight).sum() / normalizer[0]
                totals["kd"] += (result.kd * batch.token_weight).sum() / normalizer[1]
                totals["floored"] += result.metrics.get("floored", 0)
                if signal and "teacher_tail_mass" in result.metrics:
                    totals["teacher_tail_mass"] += result.metrics["teacher_tail_mass"] * (signal / tokens.signal_tokens)
                if signal:
                    more = _more(more, result.metrics, signal / tokens.signal_tokens)
        except BaseException:
            self.optimizer.zero_grad(set_to_none=True)
            raise
        finally:
            self.model.eval()
        return Gradients(tokens, totals, more, ce_weight, kd_weight)

    def _measured(self, found: Gradients, started: float) -> Gradients:
        loss, grad_norm = found.totals["loss"].item(), self._norm().item()
        return replace(found, loss=loss, grad_norm=grad_norm, seconds=time.perf_counter() - started)

    def update(self, gradients: Gradients) -> StepMetrics:
        """The second, short part of `train_step`: weights change. Raises as that does."""
        started = time.perf_counter()
        totals = gradients.totals
        try:
            self._require_finite(gradients)
            norm = torch.tensor(gradients.grad_norm, device=self.device)
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.train.clip, norm)
            lr = learning_rate_at(self.steps_done, self.planned_steps, self.train)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            if self.average is not None:
                self.average.update()
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        self.steps_done += 1
        return StepMetrics(
            step=self.steps_done,
            loss=gradients.loss,
            ce=totals["ce"].item(),
            kd=totals["kd"].item(),
            lr=lr,
            grad_norm=gradients.grad_norm,
            ce_weight=gradients.ce_weight,
            kd_weight=gradients.kd_weight,
            **asdict(gradients.tokens),
            seconds=gradients.seconds + time.perf_counter() - started,
            teacher_tail_mass=totals["teacher_tail_mass"].item() if "teacher_tail_mass" in totals else None,
            floored=int(totals["floored"].item()),
            more={name: figure.item() for name, figure in gradients.more.items()},
        )

    def drop(self) -> None:
        """In place of `update`: weights and optimizer stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)

    def weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Names and float32 tensors of the model as they are now, for a rollout engine; a tied weight comes once.

        Adapters come merged into their matrices, each made when its turn comes. ``changed_only`` leaves out what was frozen all along.
        """
        return merged_weights(self.model, changed_only=changed_only)

    def _backward(self, batch: DistillBatch, ce_weight: float, kd_weight: float, normalizer: tuple[float, float]) -> DistillLoss:
        with packed_attention(self.model):
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.compute_dtype == torch.bfloat16):
                result = self._loss(self._hidden(batch), self.head, batch, ce_weight, kd_weight, normalizer)
            result.loss.backward()
        return result

    def _hidden(self, batch: DistillBatch) -> Tensor:
        """Hidden states of all packed tokens, [P, D]."""
        return packed_hidden(self.model, batch.input_ids, batch.position_ids, batch.boundaries)

    def _loss(
        self,
        hidden_PD: Tensor,
        head: OutputHead,
        batch: DistillBatch,
        ce_weight: float,
        kd_weight: float,
        normalizer: tuple[float, float],
    ) -> DistillLoss:
        return self._objective_now().loss(
            hidden_PD[batch.target_rows].to(self.compute_dtype),  # as autocast would: with float32, products would be float32
            head.to(self.compute_dtype),
            batch,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            normalizer=normalizer,
        )

    def _norm(self) -> Tensor:
        """Of all gradients together."""
        return torch.nn.utils.get_total_norm([parameter.grad for parameter in self.model.parameters() if parameter.grad is not None])

    def _objective_now(self) -> Objective:
        if not isinstance(self.objective, Scheduled):
            return self.objective
        return self.objective.at(self.steps_done / max(1, self.planned_steps - 1))

    def _require_finite(self, gradients: Gradients) -> None:
        for what, value in (("loss", gradients.loss), ("gradient norm", gradients.grad_norm)):
            if not math.isfinite(value):
                raise TrainingError(
                    f"the {what} of update {self.steps_done + 1} is {value}, so the update was not applied: lower train.lr, lengthen "
                    "train.warmup, or look at the teacher's answers; the last checkpoint holds the weights from before"
                )


_NAMED = ("ce_tokens", "kd_tokens", "floored", "teacher_tail_mass")  # these have fields of their own in `StepMetrics`
_COUNTS = ("ratio_capped",)


def _more(so_far: Mapping[str, Tensor], metrics: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Figures of a step with those of one micro-batch more, which has ``share`` of the step's tokens with a signal.

    Counts are added up, of what ends in ``_max`` the largest stays, and all others are means over the tokens with a signal.
    """
    more = dict(so_far)
    for name, figure in metrics.items():
        if name.endswith("_max"):
            more[name] = torch.maximum(more.get(name, figure), figure)
        elif name not in _NAMED:
            more[name] = more.get(name, torch.zeros_like(figure)) + (figure if name in _COUNTS else figure * share)
    return more


def _signalled_tokens(batch: DistillBatch) -> int:
    of_spans = 0 if batch.spans is None else int(batch.spans.valid.sum())  # rows that have no signal on ids
    if batch.teacher is None:
        return of_spans
    return of_spans + (batch.response_tokens if batch.teacher.valid is None else int(batch.teacher.valid.sum()))
