"""A teacher whose tokens are not the student's, heard by what both spell.

Where the two tokenisations of the answer have the same token, and the same text before it, the teacher's distribution is told under the
student's ids, those without a counterpart in the tail: forward KL, as ever. A longer span is one event, whose probability is the product
of its tokens' (chain rule): on the student's own text reverse KL by policy gradient, the advantage log p(span) - log q_old(span) shared by
its tokens. And where a span begins, the distributions are compared by rank (Universal Logit Distillation, Boizard et al. 2402.12030).
TRL's GOLD has the same parts for teachers whose logits are at hand; it multiplies a span's distribution by the probabilities of the tokens
that followed.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``n`` those of spans, ``r`` where one begins, ``D`` hidden, ``V``
vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives.base import Facts, check_student
from bbopd.objectives.rank import rank_distances
from bbopd.ops import linear_distill
from bbopd.output_head import OutputHead
from bbopd.types import IGNORE_INDEX, DistillBatch, DistillLoss, Level, SampledTeacher, SignalSpec

FACTS = Facts(
    needs=("topk",),
    computes="forward KL on tokens in common, policy gradient on longer spans of text, distance by rank where they begin",
    source="ULD, 2402.12030; cf. GOLD in TRL",
    teacher_work="reads each sequence once, in its own tokens",
    student_work="the head once more on spans",
    same_tokens=False,
)


@dataclass(frozen=True, slots=True)
class Aligned:
    """``ce_weight * CE + kd_weight * (KL on common tokens + span_weight * policy gradient on spans + rank_weight * distance by rank)``.

    All three are sums over their tokens, divided by the tokens that have any signal; with the student's own tokenizer there are no spans,
    and what is left is ``forward_kl``.
    """

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return "aligned"

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return SignalSpec("topk", temperature=self.config.temperature, top_k=teacher.topk)

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
        check_student(hidden_ND, head)
        normalizer = normalizer or _tokens(batch)
        options: dict[str, Any] = {
            "temperature": self.config.temperature,
            "t2_scaling": self.config.t2_scaling,
            "normalizer": normalizer,
            **head.options,
        }
        out = linear_distill(
            hidden_ND,
            head.weight_VD,
            batch.teacher,
            batch.labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            token_weight=batch.token_weight,
            **options,
        )
        if batch.spans is None:
            return out
        spans, T = batch.spans, self.config.temperature
        loss, kd_N, metrics = out.loss, out.kd.clone(), dict(out.metrics)
        signalled = _tokens(batch)[1]
        metrics["aligned_share"] = metrics["kd_tokens"] / signalled
        rows = _valid_rows(spans.sampled)
        if len(rows) and self.config.span_weight:
            by_sampling = linear_distill(
                hidden_ND[rows],
                head.weight_VD,
                _sampled_rows(spans.sampled, rows),
                ce_weight=0.0,
                kd_weight=kd_weight * self.config.span_weight,
                token_weight=batch.token_weight[rows],
                **options,
            )
            loss = loss + by_sampling.loss
            kd_N[rows] += self.config.span_weight * by_sampling.kd
            for name in ("importance_ratio", "ratio_capped"):
                metrics[name] = by_sampling.metrics[name]
        rows = spans.rank_rows
        if len(rows) and self.config.rank_weight:
            distance_r = rank_distances(hidden_ND[rows], head, spans.rank_logprobs, spans.rank_log_tail, temperature=T)
            distance_r = distance_r * (self.config.rank_weight * (T**2 if self.config.t2_scaling else 1.0))
            loss = loss + (batch.token_weight[rows] * distance_r).sum() * (kd_weight / normalizer[1])
            kd_N[rows] += distance_r.detach()
        return DistillLoss(loss=loss, ce=out.ce, kd=kd_N, metrics=metrics)


def _tokens(batch: DistillBatch) -> tuple[float, float]:
    """Tokens with a label, and those with any signal."""
    signalled = torch.zeros_like(batch.labels, dtype=torch.bool)
    for part in (batch.teacher, batch.spans):
        if part is not None:
            signalled |= torch.ones_like(signalled) if part.valid is None else part.valid
    return float(max(1, int((batch.labels != IGNORE_INDEX).sum()))), float(max(1, int(signalled.sum())))


def _valid_rows(sampled: SampledTeacher) -> Tensor:
    assert sampled.valid is not None, "spans are some of the rows"
    return sampled.valid.nonzero()[:, 0]


def _sampled_rows(sampled: SampledTeacher, rows: Tensor) -> SampledTeacher:
    assert sampled.advantages is not None, "spans have advantages"
    return replace(
        sampled,
        token_ids=sampled.token_ids[rows],
        behavior_logprobs=sampled.behavior_logprobs[rows],
        advantages=sampled.advantages[rows],
        valid=None,
    )
