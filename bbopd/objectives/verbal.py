"""Policy gradient on rewards that a teacher gives in words: grades by a rubric, each answer beside its siblings.

The rewards are those of rubric-based on-policy distillation (ROPD, arXiv 2605.07396); their advantages, the clip and the penalty those of
GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3 and 4), averaged over the tokens of the whole step. It needs no vocabulary in common: grades
travel as text.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives.base import Facts
from bbopd.objectives.policy_gradient import policy_gradient_loss
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SampledTeacher, SignalSpec

FACTS = Facts(
    needs=("text",),
    computes="policy gradient on grades by a rubric, each beside those of the same prompt",
    source="ROPD, 2605.07396; GRPO, 2402.03300, eq. 3",
    teacher_work="reads and grades each rollout",
    student_work="the head once more, without gradients; with kl_weight a pass of a frozen copy",
    same_tokens=False,
)


@dataclass(frozen=True, slots=True)
class Verbal:
    """``CE``, and ``-min(r A, clip(r) A) + kl_weight * k3``, ``A`` the advantage of a rollout's grade in its group."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return "verbal"

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return SignalSpec("text", temperature=self.config.temperature)

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
        assert batch.teacher is None or isinstance(batch.teacher, SampledTeacher), "grades become advantages"
        return policy_gradient_loss(
            hidden_ND,
            head,
            batch,
            batch.teacher,
            clip=self.config.clip_range,
            reference_logprobs=batch.reference_logprobs,
            reference_kl=self.config.kl_weight,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            normalizer=normalizer,
        )
