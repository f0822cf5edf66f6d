"""The five divergences between teacher and student, token by token, beside cross-entropy where there is ground truth.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.errors import ConfigError
from bbopd.objectives.base import SIGNALS, check_offer, check_student
from bbopd.ops import linear_distill
from bbopd.types import DistillBatch, DistillLoss, Level, SignalSpec, TeacherInfo

NEEDS: dict[str, tuple[Level, ...]] = {
    "forward_kl": ("full", "topk"),
    "reverse_kl": ("full", "candidates", "sampled"),
    "jsd": ("full", "candidates", "topk"),
    "skew_forward_kl": ("full", "candidates", "topk"),
    "skew_reverse_kl": ("full", "candidates", "topk"),
}
"""The levels on whose support each divergence means something: forward KL weighs by the teacher's mass, so it wants the teacher's ids;
reverse KL by the student's, so it wants the student's. The others are bounded where one of the two is 0, and take either."""


@dataclass(frozen=True, slots=True)
class TokenLevel:
    """``ce_weight * CE + kd_weight * T^2 * KD`` with one of the divergences."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def needs(self) -> tuple[Level, ...]:
        return NEEDS[self.name]

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        level = teacher.signal
        if level == "none" or level not in self.needs:
            fitting = [name for name, needs in NEEDS.items() if level in needs] or ["seqkd" if level == "text" else "sft"]
            usable = [need for need in self.needs if need in SIGNALS]
            raise ConfigError(
                f"objective.name {self.name} cannot use teacher.signal {level}: set teacher.signal to {' or '.join(usable)}, "
                f"or objective.name to {' or '.join(fitting)}"
            )
        if level == "full":
            return SignalSpec(level="full")  # raw logits: the loss applies the temperature
        top_k = teacher.topk if level == "topk" else 0  # candidates come with the rollouts
        return SignalSpec(level=level, temperature=self.config.temperature, top_k=top_k)

    def check(self, info: TeacherInfo, want: SignalSpec) -> None:
        check_offer(self.name, info, want, NEEDS)

    def loss(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        batch: DistillBatch,
        *,
        ce_weight: float,
        kd_weight: float,
        normalizer: tuple[float, float] | None,
        bias: Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        vocab_size: int | None = None,
    ) -> DistillLoss:
        check_student(hidden_ND, weight_VD)
        return linear_distill(
            hidden_ND,
            weight_VD,
            batch.teacher,
            batch.labels,
            temperature=self.config.temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            divergence=self.config.name,
            beta=self.config.beta,
            skew=self.config.skew,
            t2_scaling=self.config.t2_scaling,
            bias=bias,
            logit_scale=logit_scale,
            logit_softcap=logit_softcap,
            vocab_size=vocab_size,
            token_weight=batch.token_weight,
            normalizer=normalizer,
        )
