"""The clipped policy gradient: a loss on sampled tokens, from one number for each.

Sources: the clip is PPO's (Schulman et al. 1707.06347, eq. 7) with two sides (DAPO, 2503.14476, eq. 10); the penalty is GRPO's (Shao et al.
2402.03300, eq. 4), the estimate "k3" of KL(q‖reference).

Shape suffixes: ``N`` rows of a batch that predict a response token, ``n`` those with a signal, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bbopd.objectives.base import check_student
from bbopd.ops import linear_distill, linear_logprobs
from bbopd.output_head import OutputHead
from bbopd.reference_math import LOG_P_FLOOR, RATIO_CAP
from bbopd.types import DistillBatch, DistillLoss, SampledTeacher

__all__ = ["Clip", "policy_gradient_loss", "sampled_advantages", "surrogate"]

Clip = tuple[float, float]
"""How far below and above 1 an importance ratio may lie before it stops counting: (0.2, 0.28) is 0.8 to 1.28."""


def sampled_advantages(teacher: SampledTeacher) -> tuple[Tensor, Tensor]:
    """The advantage of each token, [N], and how many of the teacher's logprobs were read as their floor of -30.

    Given ones as they are; else ``log p - log q_old``. A teacher that rules a token out (-inf) is no reason to move without bound.
    """
    if teacher.advantages is not None:
        return teacher.advantages, torch.zeros((), dtype=torch.int64, device=teacher.token_ids.device)
    assert teacher.logprobs is not None, "a SampledTeacher has logprobs or advantages"
    below_N = teacher.logprobs < LOG_P_FLOOR
    if teacher.valid is not None:
        below_N = below_N & teacher.valid
    return teacher.logprobs.clamp(min=LOG_P_FLOOR) - teacher.behavior_logprobs, below_N.sum()


@dataclass(frozen=True, slots=True, eq=False)
class Surrogate:
    """What a token costs, [n]; minus its derivative by the student's logprob, [n]; and what became of the ratios."""

    value: Tensor
    gain: Tensor
    metrics: Mapping[str, Tensor]


def surrogate(
    log_q_n: Tensor,
    behavior_n: Tensor,
    advantages_n: Tensor,
    clip: Clip | None,
    reference_n: Tensor | None = None,
    reference_kl: float = 0.0,
) -> Surrogate:
    """``-min(r A, clip(r) A) + reference_kl * (ρ - log ρ - 1)`` with ``r = q / q_old`` and ``ρ = q_ref / q``, token by token.

    Parameters
    ----------
    log_q_n, behavior_n, reference_n
        Logprobs of the sampled tokens, at one temperature: the student's now, those sampled from, and those of the policy not to leave.
    clip
        None leaves the ratio as it is. In any case r and ρ are truncated at 10^4, as factors that the gradient goes on past, and counted.
    """
    difference_n = log_q_n - behavior_n
    ratio_n = difference_n.exp().clamp(max=RATIO_CAP)
    capped = (difference_n > math.log(RATIO_CAP)).sum()
    used_n = ratio_n
    high_n = low_n = torch.zeros_like(ratio_n, dtype=torch.bool)
    if clip is not None:
        high_n = (ratio_n > 1 + clip[1]) & (advantages_n > 0)
        low_n = (ratio_n < 1 - clip[0]) & (advantages_n < 0)
        used_n = torch.where(high_n, 1 + clip[1], torch.where(low_n, 1 - clip[0], ratio_n))
    value_n = -used_n * advantages_n
    gain_n = torch.where(high_n | low_n, 0.0, ratio_n * advantages_n)
    one = torch.ones((), dtype=ratio_n.dtype, device=ratio_n.device)
    metrics = {
        "importance_ratio": ratio_n.sum(),
        "clipped_high": high_n.sum(),
        "clipped_low": low_n.sum(),
    }
    if reference_n is not None:
        apart_n = reference_n - log_q_n
        capped = capped + (apart_n > math.log(RATIO_CAP)).sum()
        apart_n = apart_n.clamp(max=math.log(RATIO_CAP))
        k3_n = torch.expm1(apart_n) - apart_n
        value_n = value_n + reference_kl * k3_n
        gain_n = gain_n + reference_kl * torch.expm1(apart_n)
        metrics["reference_kl"] = k3_n.sum()
    means = {name: total / max(1, len(ratio_n)) for name, total in metrics.items()}
    largest = ratio_n.max() if len(ratio_n) else one
    return Surrogate(value_n, gain_n, {**means, "importance_ratio_max": largest, "ratio_capped": capped.to(ratio_n.dtype)})


def policy_gradient_loss(
    hidden_ND: Tensor,
    head: OutputHead,
    batch: DistillBatch,
    teacher: SampledTeacher | None,
    *,
    clip: Clip | None,
    reference_logprobs: Tensor | None = None,
    reference_kl: float = 0.0,
    t2_scaling: bool = False,
    ce_weight: float,
    kd_weight: float,
    normalizer: tuple[float, float] | None,
) -> DistillLoss:
    """``ce_weight * CE + kd_weight * surrogate``: cross-entropy on the rows of ``batch`` with a label, `surrogate` on those of ``teacher``.

    One pass without a gradient tells the student's logprobs; what the surrogate wants of each then goes into `linear_distill` as its
    advantage at a ratio of 1, together with the labels. ``kd`` and ``loss`` are the surrogate's own.

    Parameters
    ----------
    teacher
        What is known of the tokens; None: of none, which leaves cross-entropy. At its temperature all logprobs are taken.
    reference_logprobs : Tensor [N], optional
        Of the policy that the student shall not leave, at the same temperature.
    reference_kl : float
        Weight of that penalty beside an advantage.
    t2_scaling : bool
        Multiply the surrogate by T^2, as a divergence at temperature T is.

    Returns
    -------
    DistillLoss
        With the metrics ``importance_ratio`` and ``importance_ratio_max``, ``clipped_high`` and ``clipped_low`` (shares of the tokens),
        ``reference_kl`` (mean, where there is a reference), ``ratio_capped`` and ``floored`` (counts).
    """
    check_student(hidden_ND, head)
    weights: dict[str, Any] = {"ce_weight": ce_weight, "kd_weight": kd_weight, "token_weight": batch.token_weight, "normalizer": normalizer}
    if teacher is None:
        return linear_distill(hidden_ND, head.weight_VD, None, batch.labels, **weights, **head.options)
    T = teacher.temperature
    valid_N = torch.ones_like(batch.labels, dtype=torch.bool) if teacher.valid is None else teacher.valid
    rows = valid_N.nonzero()[:, 0]
    log_q_n = linear_logprobs(
        hidden_ND.detach()[rows], head.weight_VD.detach(), token_ids=teacher.token_ids[rows], temperature=T, **head.options
    ).sampled
    assert log_q_n is not None, "token_ids were given"
    advantages_N, floored = sampled_advantages(teacher)
    wanted = surrogate(
        log_q_n,
        teacher.behavior_logprobs[rows].to(log_q_n.dtype),
        advantages_N[rows].to(log_q_n.dtype),
        clip,
        None if reference_logprobs is None else reference_logprobs[rows].to(log_q_n.dtype),
        reference_kl,
    )
    zeros_N = log_q_n.new_zeros(len(valid_N))
    out = linear_distill(
        hidden_ND,
        head.weight_VD,
        SampledTeacher(
            token_ids=teacher.token_ids,
            behavior_logprobs=zeros_N.index_copy(0, rows, log_q_n),
            advantages=zeros_N.index_copy(0, rows, wanted.gain),
            temperature=T,
            valid=valid_N,
        ),
        batch.labels,
        temperature=T,
        t2_scaling=t2_scaling,
        **weights,
        **head.options,
    )
    kd_N = zeros_N.index_copy(0, rows, wanted.value * (T**2 if t2_scaling else 1.0))
    tokens = max(1, len(rows)) if normalizer is None else normalizer[1] or 1.0
    correction = (batch.token_weight * (kd_N - out.kd)).sum() * (kd_weight / tokens)
    metrics = {**out.metrics, **wanted.metrics, "floored": floored}
    return DistillLoss(loss=out.loss + correction, ce=out.ce, kd=kd_N, metrics=metrics)
