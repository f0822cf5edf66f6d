"""Supervised fine-tuning: cross-entropy on labelled text alone, the baseline that asks no teacher.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives.base import Facts, check_student
from bbopd.ops import linear_distill
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SignalSpec

FACTS = Facts(
    needs=(),
    computes="cross-entropy on labelled text, and nothing else",
    source="the baseline: maximum likelihood",
    same_tokens=False,
)


@dataclass(frozen=True, slots=True)
class Sft:
    """``ce_weight * CE``; a teacher signal in the batch is not looked at."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return "sft"

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec | None:
        return None

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
        return linear_distill(
            hidden_ND,
            head.weight_VD,
            None,
            batch.labels,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            **head.options,
            token_weight=batch.token_weight,
            normalizer=normalizer,
        )
