"""Generative adversarial distillation (Ye et al. 2025, arXiv 2511.10643): the student's side of the game, eq. 2.

    max_G E[D(x, G(x))], by policy gradient

A discriminator's score of each answer is its reward; the advantage is how far it is above its group's (GRPO). What keeps the student from
chasing the score is the clip of PPO and a KL to the student of the warm-up. The warm-up itself is cross-entropy on the teacher's text.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bbopd.config import TeacherConfig
from bbopd.objectives.base import Facts
from bbopd.objectives.policy_gradient import policy_gradient_loss
from bbopd.objectives.seqkd import SeqKD
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SampledTeacher, SignalSpec

FACTS = Facts(
    needs=("text",),
    computes="policy gradient on the score of a discriminator that learns to tell the student's answers from the teacher's",
    source="Ye et al. 2025, 2511.10643 (GAD)",
    teacher_work="writes an answer to each prompt, once",
    student_work="the head once more; a pass of the reference; two passes of the discriminator over both answers, and one back",
    same_tokens=False,
)


@dataclass(frozen=True, slots=True)
class Gad(SeqKD):
    """``CE`` on the teacher's answers; on the student's own the clipped surrogate, and ``kl_weight * k3``."""

    @property
    def name(self) -> str:
        return "gad"

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
        teacher = batch.teacher
        assert teacher is None or isinstance(teacher, SampledTeacher), "rewarded answers come with advantages"
        return policy_gradient_loss(
            hidden_ND,
            head,
            batch,
            teacher,
            clip=self.config.clip_range,
            reference_logprobs=batch.reference_logprobs,
            reference_kl=self.config.gad.kl_weight,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            normalizer=normalizer,
        )
