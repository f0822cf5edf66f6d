"""The mathematics of one block of rows: softmax, split support, the five divergences, cross-entropy.

Shape suffixes: ``n`` rows of a block, ``V`` vocabulary, ``K`` ids of a support, ``C`` classes of a distribution (``V``, or ``K + 1``
with the tail bucket). Everything is in the compute dtype (float32, or float64) and in nats. No function here
synchronises with a GPU. docs/objective.md derives the formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bbopd.types import Divergence

LOG_P_FLOOR = -30.0
"""Reverse KL reads a smaller teacher log-probability (a masked token, an empty tail) as this, and counts it."""

RATIO_CAP = 1e4
"""Importance ratios of sampled tokens are truncated here, far beyond those of a rollout fresh enough to learn from, and counted."""

_INFINITY_STAND_IN = 1e30  # a teacher logit of +inf takes all the mass of its row, without inf - inf
_LOWEST = -1e9  # stands in for -inf in a difference of log-probabilities
_EXP_LIMIT = {torch.float32: 80.0, torch.float64: 600.0}  # its exponential is finite, that of its negative still normal


def softmax_in_place(u_nV: Tensor, prob_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits ``u_nV`` into log-probabilities in place, write probabilities to ``prob_nV``.

    Returns the row maximum and the logsumexp of the logits that came in, both [n, 1].
    """
    max_n1 = u_nV.amax(1, keepdim=True)
    u_nV.sub_(max_n1)
    torch.exp(u_nV, out=prob_nV)
    sum_n1 = prob_nV.sum(1, keepdim=True)
    log_sum_n1 = sum_n1.log()
    u_nV.sub_(log_sum_n1)
    prob_nV.div_(sum_n1)
    return max_n1, max_n1 + log_sum_n1


def teacher_log_softmax(logits_nV: Tensor, temperature: float, prob_nV: Tensor) -> Tensor:
    """Log-softmax at ``temperature`` of teacher logits, in place; returns their logsumexp [n, 1].

    A logit of -inf is a masked token; one of +inf takes all the mass.
    """
    logits_nV.clamp_(max=_INFINITY_STAND_IN)
    if temperature != 1.0:
        logits_nV.mul_(1.0 / temperature)
    return softmax_in_place(logits_nV, prob_nV)[1]


def divergence(
    log_p_nC: Tensor, log_q_nC: Tensor, p_nC: Tensor, q_nC: Tensor, name: Divergence, beta: float, skew: float
) -> tuple[Tensor, Tensor]:
    """A divergence of rows that each sum to 1, and its gradient by the student's logits ``u`` (``q = softmax(u)``).

    Returns ``kd`` [n] and ``grad`` [n, C]. Overwrites ``log_p_nC``. Every sum is over terms that vanish to second order as q nears
    p, so that the result is exact to rounding near 0, and non-negative.
    """
    if name == "reverse_kl":
        log_p_nC = log_p_nC.clamp_(min=LOG_P_FLOOR)
    # where both are -inf (a token masked on both sides) p and q are 0, and any finite d serves
    d_nC = log_p_nC.clamp_(min=_LOWEST).sub_(log_q_nC.clamp(min=_LOWEST))
    if name == "reverse_kl":
        # KL(q||p) = sum (p - q) - q d;  dKL/du = q (-d - sum q (-d))
        grad_nC = torch.mul(q_nC, d_nC).neg_()
        kd_n = (grad_nC - _difference(p_nC, q_nC, d_nC)).sum(1)
        return kd_n, grad_nC.addcmul_(q_nC, grad_nC.sum(1, keepdim=True), value=-1.0)
    if name == "forward_kl":
        # KL(p||q) = sum (q - p) + p d;  dKL/du = q - p
        gap_nC = _difference(p_nC, q_nC, d_nC)
        kd_n = torch.mul(p_nC, d_nC).add_(gap_nC).sum(1)
        return kd_n, gap_nC
    d_nC.clamp_(-_EXP_LIMIT[d_nC.dtype], _EXP_LIMIT[d_nC.dtype])  # beyond it the term is settled, and expm1 would overflow
    if name == "jsd":
        # m = beta p + (1 - beta) q;  log(m/p) = log1p((1-beta) expm1(-d)), log(m/q) = log1p(beta expm1(d))
        log_mp_nC = torch.neg(d_nC).expm1_().mul_(1.0 - beta).log1p_()
        q_log_mq_nC = d_nC.expm1_().mul_(beta).log1p_().mul_(q_nC)
        kd_n = -(beta * (p_nC * log_mp_nC) + (1.0 - beta) * q_log_mq_nC).sum(1)
        return kd_n, _through_softmax(q_log_mq_nC, q_nC).mul_(beta - 1.0)
    if name == "skew_forward_kl":
        # m = skew p + (1 - skew) q, x = m/p - 1;  KL(p||m) = sum (m - p) - p log1p(x);  q h = (1-skew) q x / (1+x)
        x_nC = torch.neg(d_nC).expm1_().mul_(1.0 - skew)
        gap_nC = _difference(p_nC, q_nC, d_nC).mul_(1.0 - skew)
        kd_n = gap_nC.sub_(p_nC * x_nC.log1p()).sum(1)
        return kd_n, _through_softmax(x_nC.div_(1.0 + x_nC).mul_(q_nC), q_nC).mul_(1.0 - skew)
    # skew_reverse_kl: m = skew q + (1 - skew) p, y = m/q - 1;  KL(q||m) = sum (m - q) - q log1p(y);  h = skew y/(1+y) - log1p(y)
    y_nC = torch.expm1(d_nC).mul_(1.0 - skew)
    gap_nC = _difference(p_nC, q_nC, d_nC).mul_(skew - 1.0)
    log_y_nC = y_nC.log1p()
    kd_n = gap_nC.sub_(q_nC * log_y_nC).sum(1)
    return kd_n, _through_softmax(y_nC.div_(1.0 + y_nC).mul_(skew).sub_(log_y_nC).mul_(q_nC), q_nC)


def _difference(p_nC: Tensor, q_nC: Tensor, d_nC: Tensor) -> Tensor:
    """``q - p`` with a relative error of rounding even where they nearly agree: max(p, q) sign(d) expm1(-|d|), d = log p - log q."""
    return torch.abs(d_nC).neg_().expm1_().mul_(torch.maximum(p_nC, q_nC)).mul_(d_nC.sign())


def _through_softmax(qh_nC: Tensor, q_nC: Tensor) -> Tensor:
    """The gradient by logits, ``q (h - sum q h)``, from ``q h``, in place."""
    return qh_nC.addcmul_(q_nC, qh_nC.sum(1, keepdim=True), value=-1.0)


@dataclass(frozen=True, slots=True)
class Support:
    """A few ids per row, and everything else. Empty slots repeat a live slot of the row, so that scattering needs no mask."""

    ids: Tensor  # [n, K]
    live: Tensor  # [n, K] bool
    values: Tensor  # [n, K] logits at the ids, as they were before the fill
    twin: Tensor  # [n, 1] a live slot
    off_max: Tensor  # [n, 1] the largest logit outside the support (0 where nothing is outside)

    def scatter(self, z_nV: Tensor, g_nK: Tensor) -> None:
        """Write ``g_nK`` at the ids; a row's empty slots write what their twin writes."""
        z_nV.scatter_(1, self.ids, torch.where(self.live, g_nK, g_nK.gather(1, self.twin)))


def take_ids(z_nV: Tensor, ids_nK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the logits at ``ids_nK`` (-1 is an empty slot) and put -inf in their places; the first four fields of `Support`.

    A row without any id gets id 0 as its support: such rows carry no signal, and what is left of their softmax stays right.
    """
    live_nK = ids_nK >= 0
    twin_n1 = live_nK.to(torch.uint8).argmax(1, keepdim=True)
    live_nK = live_nK.scatter(1, twin_n1, True)
    ids_nK = ids_nK.clamp(min=0)
    ids_nK = torch.where(live_nK, ids_nK, ids_nK.gather(1, twin_n1))
    values_nK = z_nV.gather(1, ids_nK)
    z_nV.scatter_(1, ids_nK, -torch.inf)
    return ids_nK, live_nK, values_nK, twin_n1


def take_support(z_nV: Tensor, ids_nK: Tensor) -> Support:
    """What `take_ids` does, and the largest logit outside the support."""
    taken = take_ids(z_nV, ids_nK)
    off_max_n1 = z_nV.amax(1, keepdim=True)
    return Support(*taken, off_max_n1.masked_fill_(off_max_n1 == -torch.inf, 0.0))


def support_log_probs(support: Support, off_sum_n1: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the support and of its tail bucket, [n, K + 1], and the logsumexp [n, 1], at ``temperature``.

    ``off_sum_n1`` is the sum of ``exp((z - off_max) / T)`` outside the support: the tail is summed, never 1 minus the rest.
    """
    log_off_n1 = support.off_max / temperature + off_sum_n1.log()
    values_nK = (support.values / temperature).masked_fill(~support.live, -torch.inf)
    bucketed_nC = torch.cat([values_nK, log_off_n1], 1)
    lse_n1 = bucketed_nC.logsumexp(1, keepdim=True)
    return bucketed_nC - lse_n1, lse_n1


def stable_top_k(z_nV: Tensor, k: int) -> Tensor:
    """Ids of the ``k`` largest of each row, largest first; of equal ones the lower id is taken, and comes first. [n, k] int64."""
    V = z_nV.shape[1]
    values_nK, ids_nK = torch.topk(z_nV, min(k + 1, V))
    # topk picks any of several equal values at the cut; asking whether there are any is free on a CPU and a sync on a GPU
    if k < V and (z_nV.device.type != "cpu" or bool((values_nK[:, k - 1] == values_nK[:, k]).any())):
        cut_n1 = values_nK[:, k - 1 : k]
        above_n1 = (values_nK[:, :k] > cut_n1).sum(1, keepdim=True)
        countdown_V = torch.arange(V, 0, -1, device=z_nV.device, dtype=torch.int32)
        tied_nK = V - torch.topk(torch.where(z_nV == cut_n1, countdown_V, 0), k).values.long()
        slot_K = torch.arange(k, device=z_nV.device)
        ids_nK = torch.where(slot_K < above_n1, ids_nK[:, :k], tied_nK.gather(1, (slot_K - above_n1).clamp(min=0)))
    ids_nK = ids_nK[:, :k].sort(1).values
    order_nK = z_nV.gather(1, ids_nK).sort(dim=1, descending=True, stable=True).indices
    return ids_nK.gather(1, order_nK)
