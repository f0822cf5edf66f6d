"""Policy gradient on rewards that a teacher gives in words: grades by a rubric, each answer beside its siblings.

The rewards are those of rubric-based on-policy distillation (ROPD, arXiv 2605.07396); their advantages and the clip those of GRPO (Shao et
al. 2024, arXiv 2402.03300, eq. 3), averaged over the tokens of the whole step. It needs no vocabulary in common: grades travel as text.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives.policy_gradient import policy_gradient_loss
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SampledTeacher, SignalSpec, TeacherInfo


@dataclass(frozen=True, slots=True)
class Verbal:
    """``ce_weight * CE + kd_weight * -min(r A, clip(r) A)``, ``A`` the advantage of a rollout's grade in its group."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return "verbal"

    @property
    def needs(self) -> tuple[Level, ...]:
        return ("text",)

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        if teacher.signal != "text":
            raise ConfigError(f"objective.name verbal learns from grades in words, not from {teacher.signal}: set teacher.signal=text")
        return SignalSpec("text", temperature=self.config.temperature)

    def check(self, info: TeacherInfo, want: SignalSpec) -> None:
        if info.offer("text") is None:
            offered = ", ".join(offer.level for offer in info.offers) or "nothing"
            raise TeacherError(
                f"verbal lets the teacher grade in words, but teacher {info.model} offers {offered}: take one that writes (text)"
            )

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
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            normalizer=normalizer,
        )
