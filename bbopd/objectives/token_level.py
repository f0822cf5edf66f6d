"""The five divergences between teacher and student, token by token, beside cross-entropy where there is ground truth.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives.base import Facts, check_student
from bbopd.ops import linear_distill, linear_logprobs
from bbopd.output_head import OutputHead
from bbopd.reference_math import divergence_shares
from bbopd.types import CandidateTeacher, DistillBatch, DistillLoss, Divergence, Level, SignalSpec, TopKTeacher


def _divergence(needs: tuple[Level, ...], computes: str, source: str) -> Facts:
    chooses = "with candidates: labelled text once more, without gradients" if "candidates" in needs else "nothing"
    return Facts(needs, computes, source, "reads each sequence once", chooses)


FACTS: dict[str, Facts] = {
    "forward_kl": _divergence(("full", "topk"), "KL(p || q), token by token", "Hinton et al. 2015, 1503.02531"),
    "reverse_kl": _divergence(("full", "candidates"), "KL(q || p), token by token", "Gu et al. 2023, 2306.08543 (MiniLLM)"),
    "jsd": _divergence(
        ("full", "candidates", "topk"),
        "beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q",
        "Agarwal et al. 2023, 2306.13649 (GKD), section 2",
    ),
    "skew_forward_kl": _divergence(
        ("full", "candidates", "topk"), "KL(p || skew p + (1 - skew) q)", "Ko et al. 2024, 2402.03898 (DistiLLM), section 3.1"
    ),
    "skew_reverse_kl": _divergence(
        ("full", "candidates", "topk"), "KL(q || skew q + (1 - skew) p)", "Ko et al. 2024, 2402.03898 (DistiLLM), section 3.1"
    ),
}
"""Needs are the levels on whose support each divergence means something: forward KL weighs by the teacher's mass, so it wants the teacher's
ids; reverse KL by the student's, so it wants the student's. The others are bounded where one of the two is 0, and take either."""

_TAIL_TOKENS = 256


@dataclass(frozen=True, slots=True)
class TokenLevel:
    """``ce_weight * CE + kd_weight * T^2 * KD`` with one of the divergences."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS[self.name].needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        level = teacher.signal
        assert level != "none"
        if level == "full":
            return SignalSpec(level="full")  # raw logits: the loss applies the temperature
        top_k = teacher.topk if level == "topk" else 0  # candidates come with the rollouts
        return SignalSpec(level=level, temperature=self.config.temperature, top_k=top_k)

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
        config = self.config
        out = linear_distill(
            hidden_ND,
            head.weight_VD,
            batch.teacher,
            batch.labels,
            temperature=config.temperature,
            ce_weight=ce_weight,
            kd_weight=kd_weight,
            divergence=config.name,
            beta=config.beta,
            skew=config.skew,
            t2_scaling=config.t2_scaling,
            token_weight=batch.token_weight,
            normalizer=normalizer,
            **head.options,
        )
        if head.group is not None or not isinstance(batch.teacher, TopKTeacher | CandidateTeacher):
            return out
        kd_N = out.kd / (config.temperature**2 if config.t2_scaling else 1.0)
        share = tail_share(hidden_ND, head, batch.teacher, kd_N, cast("Divergence", config.name), config.beta, config.skew)
        return replace(out, metrics={**out.metrics, "tail_share": share})


@torch.no_grad()
def tail_share(
    hidden_ND: Tensor,
    head: OutputHead,
    teacher: TopKTeacher | CandidateTeacher,
    kd_N: Tensor,
    name: Divergence,
    beta: float,
    skew: float,
) -> Tensor:
    """How large a share of the divergences ``kd_N`` is that of the tail buckets, where only the total is learned; a scalar in 0..1.

    Told by the first 256 tokens, as it takes the student's tails, which are a matrix product of their own.
    """
    if name == "jsd" and beta in (0.0, 1.0):
        name = "forward_kl" if beta == 0.0 else "reverse_kl"
    rows = slice(0, _TAIL_TOKENS)
    ids_nK = teacher.ids[rows]
    found = linear_logprobs(
        hidden_ND.detach()[rows], head.weight_VD.detach(), candidate_ids=ids_nK, temperature=teacher.temperature, **head.options
    )
    assert found.candidates_log_tail is not None, "candidate_ids were given"
    log_q_n1 = found.candidates_log_tail[:, None]
    log_p_nC = torch.cat([teacher.logprobs[rows].masked_fill(ids_nK < 0, -torch.inf), teacher.log_tail[rows, None]], 1).to(log_q_n1)
    log_p_n1 = (log_p_nC[:, -1:] - log_p_nC.logsumexp(1, keepdim=True)).masked_fill(log_q_n1 == -torch.inf, -torch.inf)
    tail_n = divergence_shares(log_p_n1.clone(), log_q_n1, log_p_n1.exp(), log_q_n1.exp(), name, beta, skew).kd
    counts_n = (ids_nK >= 0).any(1) if teacher.valid is None else teacher.valid[rows] & (ids_nK >= 0).any(1)
    total = torch.where(counts_n, kd_N[rows], 0.0).sum()
    return (torch.where(counts_n, tail_n, 0.0).sum() / total.clamp(min=1e-12)).clamp(0.0, 1.0).float()
