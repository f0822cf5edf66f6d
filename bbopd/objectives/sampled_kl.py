"""Reverse KL by policy gradient: each token that the student sampled is credited with what the teacher thinks of it.

Sources: *On-Policy Distillation* (Thinking Machines Lab, 2025) for the advantage and the discount; Oh et al., *KL for a KL* (arXiv
2605.07865) for the baseline.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``n`` those of a block, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives.base import Facts
from bbopd.objectives.policy_gradient import policy_gradient_loss, sampled_advantages
from bbopd.ops import linear_distill
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, FullTeacher, Level, SampledTeacher, SignalSpec

FACTS = Facts(
    needs=("sampled", "full", "candidates", "topk"),
    computes="reverse KL by policy gradient: the advantage of a token is log p - log q_old, with clip, discount and baseline",
    source="On-Policy Distillation (Thinking Machines, 2025); vOPD, 2605.07865",
    teacher_work="reads each rollout once",
    student_work="the head once more, without gradients; twice with baseline: kl",
)

_BLOCK_BYTES = 2**26  # of float32 logits that are summed at once


@dataclass(frozen=True, slots=True)
class SampledKL:
    """``ce_weight * CE + kd_weight * T^2 * -min(r A, clip(r) A)``; A is `reward_to_go` of log p - log q_old, less the baseline."""

    config: ObjectiveConfig

    @property
    def name(self) -> str:
        return "policy_gradient"

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS.needs[1:] if self.config.baseline == "kl" else FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        level = teacher.signal
        assert level != "none"
        if level == "full":
            return SignalSpec(level="full", rollouts_only=True)  # raw logits: the loss applies the temperature
        top_k = teacher.topk if level == "topk" else 0  # candidates come with the rollouts
        return SignalSpec(level=level, temperature=self.config.temperature, top_k=top_k, rollouts_only=True)

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
        sampled, more = self._credit(hidden_ND, head, batch)
        out = policy_gradient_loss(
            hidden_ND, head, batch, sampled, clip=self.config.clip_range, t2_scaling=self.config.t2_scaling, ce_weight=ce_weight,
            kd_weight=kd_weight, normalizer=normalizer,
        )  # fmt: skip
        return replace(out, metrics={**out.metrics, **more})

    def _credit(self, hidden_ND: Tensor, head: OutputHead, batch: DistillBatch) -> tuple[SampledTeacher | None, dict[str, Tensor]]:
        """The sampled tokens with the advantage of each, and what to tell of them."""
        sampled = sampled_tokens(batch, self.config.temperature, head.vocab_size)
        if sampled is None:
            return None, {}
        assert sampled.valid is not None
        own_N, floored = sampled_advantages(sampled)
        own_N = torch.where(sampled.valid, own_N, 0.0)
        more = {"sampled_kl": -own_N.sum() / sampled.valid.sum().clamp(min=1), "floored": floored}
        advantages_N = reward_to_go(own_N, sequences_of(batch), self.config.discount)
        if self.config.baseline == "kl":
            kl_N = self._kl(hidden_ND, head, batch)
            more["baseline_kl"] = torch.where(sampled.valid, kl_N, 0.0).sum() / sampled.valid.sum().clamp(min=1)
            advantages_N = advantages_N + kl_N
        return replace(sampled, logprobs=None, advantages=advantages_N), more

    @torch.no_grad()
    def _kl(self, hidden_ND: Tensor, head: OutputHead, batch: DistillBatch) -> Tensor:
        """KL(q‖p) at each row [N], of the student as it is now: minus what a sampled token's advantage is on average."""
        return linear_distill(
            hidden_ND.detach(), head.weight_VD.detach(), batch.teacher, temperature=self.config.temperature, divergence="reverse_kl",
            kd_weight=1.0, t2_scaling=False, **head.options,
        ).kd  # fmt: skip


def sampled_tokens(batch: DistillBatch, temperature: float, vocab_size: int | None) -> SampledTeacher | None:
    """What is known of the tokens that the student sampled: what it drew them from, and the teacher's logprob, at one temperature.

    None where the batch has no signal at all. Rows that nobody sampled, or that the teacher was not asked about, are not ``valid``.
    """
    if batch.teacher is None:
        return None
    if isinstance(batch.teacher, SampledTeacher):
        everything_N = torch.ones_like(batch.labels, dtype=torch.bool)
        return batch.teacher if batch.teacher.valid is not None else replace(batch.teacher, valid=everything_N)
    assert batch.behavior_logprobs is not None, "assemble gives them"
    logprobs_N = teacher_logprobs(batch, temperature, vocab_size)
    valid_N = batch.behavior_logprobs.isfinite()
    return SampledTeacher(
        token_ids=batch.target_ids,
        behavior_logprobs=batch.behavior_logprobs,
        logprobs=logprobs_N,
        temperature=temperature,
        valid=valid_N if batch.teacher.valid is None else valid_N & batch.teacher.valid,
    )


def teacher_logprobs(batch: DistillBatch, temperature: float, vocab_size: int | None) -> Tensor:
    """The teacher's logprobs [N] of the tokens that are there, from a signal that tells more; meaningless where that is not valid."""
    logprobs_N = batch.sampled_logprobs
    if isinstance(batch.teacher, FullTeacher):
        assert batch.teacher.logits is not None, "assemble gives logits"
        logprobs_N = _logprobs_at(batch.teacher.logits, batch.target_ids, temperature, vocab_size)
    assert logprobs_N is not None, "assemble gives them"
    return logprobs_N


def _logprobs_at(logits_NV: Tensor, ids_N: Tensor, temperature: float, vocab_size: int | None) -> Tensor:
    """Log-probability of each row's own id, a block of rows at a time."""
    used_NV = logits_NV[:, :vocab_size]
    out_N = torch.empty(len(ids_N), dtype=torch.promote_types(logits_NV.dtype, torch.float32), device=logits_NV.device)
    step = max(1, _BLOCK_BYTES // (4 * used_NV.shape[1]))
    for start in range(0, len(ids_N), step):
        rows = slice(start, start + step)
        z_nV = used_NV[rows].to(out_N.dtype) / temperature
        out_N[rows] = z_nV.gather(1, ids_N[rows, None])[:, 0] - z_nV.logsumexp(1)
    return out_N


def sequences_of(batch: DistillBatch) -> Tensor:
    """The number of the packed sequence that each row belongs to, [N]."""
    return torch.bucketize(batch.target_rows, batch.boundaries.to(batch.target_rows.dtype), right=True)


def reward_to_go(own_N: Tensor, sequence_N: Tensor, discount: float) -> Tensor:
    """``sum_{s >= t} discount^(s - t) own_s`` over the later rows of the same sequence, whose rows follow each other.

    Runs of rows are doubled until they reach the end: as many passes as the longest response has binary digits.
    """
    if discount == 0.0 or len(own_N) == 0:
        return own_N
    total_N = own_N.double()
    factor, reach = discount, 1
    while reach < len(own_N):
        same_n = sequence_N[reach:] == sequence_N[:-reach]
        later_n = torch.where(same_n, factor * total_N[reach:], 0.0)
        total_N = total_N + torch.cat([later_n, total_N.new_zeros(reach)])
        factor, reach = factor * factor, 2 * reach
    return total_N.to(own_N.dtype)
