"""One divergence on labelled sequences, another on the student's own, each with a weight and a skew that may change over the run.

Its defaults are DistiLLM-2's two terms (Ko et al., 2503.07067, section 3): skew forward KL where the teacher wrote, which raises what the
teacher holds likely, and skew reverse KL where the student wrote, which lowers what it does not.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``n`` those of one side, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from bbopd.config import TeacherConfig
from bbopd.config_objective import ObjectiveConfig, SideConfig, value_at
from bbopd.objectives import token_level
from bbopd.objectives.adaptive_skew import sample_leads, sample_skews
from bbopd.objectives.base import Facts
from bbopd.objectives.sampled_kl import sequences_of, teacher_logprobs
from bbopd.objectives.token_level import TokenLevel
from bbopd.ops import linear_logprobs
from bbopd.output_head import OutputHead
from bbopd.types import IGNORE_INDEX, DistillBatch, DistillLoss, Level, OpTeacher, SignalSpec

FACTS = Facts(
    needs=("full", "candidates", "topk"),
    computes="one divergence on labelled text, another on rollouts, with weights and skews that may change over the run",
    source="Ko et al. 2025, 2503.07067 (DistiLLM-2)",
    teacher_work="reads each sequence once",
    student_work="with candidates: labelled text once more, without gradients",
)

_MEANS = ("teacher_tail_mass", "tail_share")  # over the tokens with a signal; what else the op tells are counts


@dataclass(frozen=True, slots=True)
class Mixed:
    """``ce_weight * CE + kd_weight * T^2 * KD``, KD being that of a token's side times the side's weight."""

    config: ObjectiveConfig
    progress: float = 0.0
    """Of the run, from 0 to 1."""

    @property
    def name(self) -> str:
        return "mixed"

    @property
    def needs(self) -> tuple[Level, ...]:
        labelled, rollouts = (token_level.FACTS[side.name].needs for side in (self.config.labelled, self.config.rollouts))
        return tuple(level for level in labelled if level in rollouts)

    def at(self, progress: float) -> Mixed:
        """The same with the weights and skews of another time."""
        return replace(self, progress=progress)

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return self._token_level(self.config.labelled, value_at(self.config.labelled.skew, 0.0)).signal(teacher)

    def loss(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        batch: DistillBatch,
        *,
        ce_weight: float,
        kd_weight: float,
        normalizer: tuple[float, float] | None,
    ) -> DistillLoss:
        is_labelled_N = batch.labels != IGNORE_INDEX
        signals_N = _signals(batch)
        if normalizer is None:
            normalizer = (max(1.0, float(is_labelled_N.sum())), max(1.0, float(signals_N.sum())))
        loss = hidden_ND.sum() * 0.0  # differentiable where a batch has no row at all
        ce_N, kd_N = (torch.zeros(len(hidden_ND), dtype=torch.float32, device=hidden_ND.device) for _ in range(2))
        metrics: dict[str, Tensor] = {}
        sides = (("labelled", self.config.labelled, is_labelled_N), ("rollouts", self.config.rollouts, ~is_labelled_N))
        for name, side, chosen_N in sides:
            weight, of_side = value_at(side.weight, self.progress), signals_N.new_zeros((), dtype=torch.float64)
            for rows_n, skew in self._parts(hidden_ND, head, batch, name, side, chosen_N, metrics):
                out = self._token_level(side, skew).loss(
                    hidden_ND[rows_n],
                    head,
                    _rows(batch, rows_n),
                    ce_weight=ce_weight,
                    kd_weight=kd_weight * weight,
                    normalizer=normalizer,
                )
                loss = loss + out.loss
                ce_N, kd_N = ce_N.to(out.ce).index_copy(0, rows_n, out.ce), kd_N.to(out.kd).index_copy(0, rows_n, out.kd * weight)
                _add(metrics, out.metrics, signals_N[rows_n].sum() / signals_N.sum().clamp(min=1))
                of_side = of_side + (out.kd * weight).sum()
            if chosen_N.any():
                metrics[f"kd_{name}"] = of_side / signals_N.sum().clamp(min=1)
        return DistillLoss(loss=loss, ce=ce_N, kd=kd_N, metrics=metrics)

    def _parts(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        batch: DistillBatch,
        name: str,
        side: SideConfig,
        chosen_N: Tensor,
        metrics: dict[str, Tensor],
    ) -> Iterator[tuple[Tensor, float]]:
        """The rows of a side, in as many parts as its samples have different skews; ``metrics`` hears how far these are apart."""
        rows_n, skew = chosen_N.nonzero()[:, 0], value_at(side.skew, self.progress)
        if not len(rows_n):
            return
        if side.gap is None or batch.teacher is None:
            yield rows_n, skew
            return
        log_p_N = teacher_logprobs(batch, self.config.temperature, head.vocab_size)
        log_q_n = linear_logprobs(
            hidden_ND.detach()[rows_n],
            head.weight_VD.detach(),
            token_ids=batch.target_ids[rows_n],
            temperature=self.config.temperature,
            **head.options,
        ).sampled
        assert log_q_n is not None, "token_ids were given"
        ahead_n, behind_n = (log_p_N[rows_n], log_q_n) if name == "labelled" else (log_q_n, log_p_N[rows_n])
        valid_n, sequence_n = _signals(batch)[rows_n], sequences_of(batch)[rows_n]
        leads_S = sample_leads(ahead_n, behind_n, valid_n, sequence_n)
        skews_n = sample_skews(leads_S, skew, side.gap)[sequence_n]
        tokens = _signals(batch).sum().clamp(min=1)
        metrics[f"lead_{name}"] = torch.where(valid_n, leads_S[sequence_n], 0.0).sum() / tokens
        metrics[f"skew_{name}"] = torch.where(valid_n, skews_n, 0.0).sum() / tokens
        metrics[f"share_{name}"] = valid_n.sum() / tokens
        for value in skews_n.unique():
            yield rows_n[skews_n == value], float(value)

    def _token_level(self, side: SideConfig, skew: float) -> TokenLevel:
        return TokenLevel(self.config.model_copy(update={"name": side.name, "beta": side.beta, "skew": skew}))


def _signals(batch: DistillBatch) -> Tensor:
    """The rows [N] bool that carry a signal."""
    if batch.teacher is None:
        return torch.zeros_like(batch.labels, dtype=torch.bool)
    return torch.ones_like(batch.labels, dtype=torch.bool) if batch.teacher.valid is None else batch.teacher.valid


def _rows(batch: DistillBatch, rows_n: Tensor) -> DistillBatch:
    """A part of the rows of a batch, as far as a loss looks at it."""
    if len(rows_n) == len(batch.labels):
        return batch
    return replace(
        batch,
        target_rows=batch.target_rows[rows_n],
        target_ids=batch.target_ids[rows_n],
        labels=batch.labels[rows_n],
        token_weight=batch.token_weight[rows_n],
        teacher=None if batch.teacher is None else _teacher_rows(batch.teacher, rows_n),
    )


def _teacher_rows(teacher: OpTeacher, rows_n: Tensor) -> OpTeacher:
    """A teacher of those rows; a head, which a full teacher may bring, is of all of them."""
    tensors = {one.name: getattr(teacher, one.name) for one in fields(teacher) if one.name not in ("weight", "bias")}
    cut: dict[str, Any] = {name: tensor[rows_n] for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    return replace(teacher, **cut)


def _add(metrics: dict[str, Tensor], more: Mapping[str, Tensor], share: Tensor) -> None:
    for name, figure in more.items():
        part = figure * share if name in _MEANS else figure
        metrics[name] = metrics[name] + part if name in metrics else part
