"""The mathematics of one block of rows: softmax, split support, the five divergences, cross-entropy.

Each sum over the vocabulary is a step of its own, so that a rank that holds a part of the columns can add up with the others between.

Shape suffixes: ``n`` rows of a block, ``V`` vocabulary, ``K`` ids of a support, ``C`` classes of a distribution (``V``, or ``K + 1``
with the tail bucket). Everything is in the compute dtype (float32, or float64) and in nats. No function here
synchronises with a GPU. docs/objective.md derives the formulas.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bbopd.reference_vocabulary import WHOLE, Whole
from bbopd.types import Divergence

LOG_P_FLOOR = -30.0
"""Reverse KL reads a smaller teacher log-probability (a masked token, an empty tail) as this, and counts it."""

RATIO_CAP = 1e4
"""Importance ratios of sampled tokens are truncated here, far beyond those of a rollout fresh enough to learn from, and counted."""

_INFINITY_STAND_IN = 1e30  # a teacher logit of +inf takes all the mass of its row, without inf - inf
_LOWEST = -1e9  # stands in for -inf in a difference of log-probabilities
_EXP_LIMIT = {torch.float32: 80.0, torch.float64: 600.0}  # its exponential is finite, that of its negative still normal


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """In which products are of the dtypes that they are given; tensors on "meta", of which memory is counted, have no autocast."""
    return torch.autocast(device.type, enabled=False) if torch.amp.is_autocast_available(device.type) else nullcontext()


def softmax_in_place(u_nV: Tensor, prob_nV: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits ``u_nV`` into log-probabilities in place, write probabilities to ``prob_nV``.

    Returns the row maximum and the logsumexp of the logits that came in, both [n, 1].
    """
    max_n1 = u_nV.amax(1, keepdim=True)
    sum_n1 = exponentials(u_nV, max_n1, prob_nV)
    return max_n1, max_n1 + normalise(u_nV, prob_nV, sum_n1)


def exponentials(u_nV: Tensor, max_n1: Tensor, prob_nV: Tensor) -> Tensor:
    """Subtract the row maximum from ``u_nV`` in place, write exponentials to ``prob_nV``; their sums over these columns [n, 1]."""
    u_nV.sub_(max_n1)
    torch.exp(u_nV, out=prob_nV)
    return prob_nV.sum(1, keepdim=True)


def normalise(u_nV: Tensor, prob_nV: Tensor, sum_n1: Tensor) -> Tensor:
    """Make log-probabilities and probabilities of what `exponentials` left, in place; the logarithm of the sum over all columns."""
    log_sum_n1 = sum_n1.log()
    u_nV.sub_(log_sum_n1)
    prob_nV.div_(sum_n1)
    return log_sum_n1


def temper_teacher(logits_nV: Tensor, temperature: float) -> Tensor:
    """Teacher logits over ``temperature``, in place. One of -inf is a masked token; one of +inf takes all the mass."""
    logits_nV.clamp_(max=_INFINITY_STAND_IN)
    return logits_nV if temperature == 1.0 else logits_nV.mul_(1.0 / temperature)


@dataclass(frozen=True, slots=True)
class Shares:
    """What some columns contribute to a divergence of rows that each sum to 1; what is [n] is to be summed over all columns."""

    kd: Tensor  # [n]
    qh: Tensor  # [n, C] the gradient by the student's logits u, q = softmax(u), but for its mean and factor
    mean: Tensor | None  # [n] sum of qh; None where it is 0 (forward KL)
    factor: float = 1.0

    def gradient(self, mean_n: Tensor | None, q_nC: Tensor) -> Tensor:
        """By the student's logits, ``factor * (qh - q mean)`` [n, C], in place of ``qh``; ``mean_n`` over all columns."""
        if mean_n is None:
            return self.qh
        grad_nC = self.qh.addcmul_(q_nC, mean_n[:, None], value=-1.0)
        return grad_nC if self.factor == 1.0 else grad_nC.mul_(self.factor)


def divergence(
    log_p_nC: Tensor, log_q_nC: Tensor, p_nC: Tensor, q_nC: Tensor, name: Divergence, beta: float, skew: float
) -> tuple[Tensor, Tensor]:
    """A divergence of rows that each sum to 1 here, [n], and its gradient by the student's logits, [n, C]; as `divergence_shares`."""
    shares = divergence_shares(log_p_nC, log_q_nC, p_nC, q_nC, name, beta, skew)
    return shares.kd, shares.gradient(shares.mean, q_nC)


def divergence_shares(log_p_nC: Tensor, log_q_nC: Tensor, p_nC: Tensor, q_nC: Tensor, name: Divergence, beta: float, skew: float) -> Shares:
    """What these columns contribute to a divergence and its gradient.

    Overwrites ``log_p_nC``. Every sum is over terms that vanish to second order as q nears p, so that the result is exact to rounding
    near 0, and non-negative.
    """
    if name == "reverse_kl":
        log_p_nC = log_p_nC.clamp_(min=LOG_P_FLOOR)
    # where both are -inf (a token masked on both sides) p and q are 0, and any finite d serves
    d_nC = log_p_nC.clamp_(min=_LOWEST).sub_(log_q_nC.clamp(min=_LOWEST))
    if name == "reverse_kl":
        # KL(q||p) = sum (p - q) - q d;  dKL/du = q (-d - sum q (-d))
        grad_nC = torch.mul(q_nC, d_nC).neg_()
        return Shares((grad_nC - _difference(p_nC, q_nC, d_nC)).sum(1), grad_nC, grad_nC.sum(1))
    if name == "forward_kl":
        # KL(p||q) = sum (q - p) + p d;  dKL/du = q - p
        gap_nC = _difference(p_nC, q_nC, d_nC)
        return Shares(torch.mul(p_nC, d_nC).add_(gap_nC).sum(1), gap_nC, None)
    d_nC.clamp_(-_EXP_LIMIT[d_nC.dtype], _EXP_LIMIT[d_nC.dtype])  # beyond it the term is settled, and expm1 would overflow
    if name == "jsd":
        # m = beta p + (1 - beta) q;  log(m/p) = log1p((1-beta) expm1(-d)), log(m/q) = log1p(beta expm1(d))
        log_mp_nC = torch.neg(d_nC).expm1_().mul_(1.0 - beta).log1p_()
        q_log_mq_nC = d_nC.expm1_().mul_(beta).log1p_().mul_(q_nC)
        kd_n = -(beta * (p_nC * log_mp_nC) + (1.0 - beta) * q_log_mq_nC).sum(1)
        return Shares(kd_n, q_log_mq_nC, q_log_mq_nC.sum(1), beta - 1.0)
    if name == "skew_forward_kl":
        # m = skew p + (1 - skew) q, x = m/p - 1;  KL(p||m) = sum (m - p) - p log1p(x);  q h = (1-skew) q x / (1+x)
        x_nC = torch.neg(d_nC).expm1_().mul_(1.0 - skew)
        gap_nC = _difference(p_nC, q_nC, d_nC).mul_(1.0 - skew)
        kd_n = gap_nC.sub_(p_nC * x_nC.log1p()).sum(1)
        qh_nC = x_nC.div_(1.0 + x_nC).mul_(q_nC)
        return Shares(kd_n, qh_nC, qh_nC.sum(1), 1.0 - skew)
    # skew_reverse_kl: m = skew q + (1 - skew) p, y = m/q - 1;  KL(q||m) = sum (m - q) - q log1p(y);  h = skew y/(1+y) - log1p(y)
    y_nC = torch.expm1(d_nC).mul_(1.0 - skew)
    gap_nC = _difference(p_nC, q_nC, d_nC).mul_(skew - 1.0)
    log_y_nC = y_nC.log1p()
    kd_n = gap_nC.sub_(q_nC * log_y_nC).sum(1)
    qh_nC = y_nC.div_(1.0 + y_nC).mul_(skew).sub_(log_y_nC).mul_(q_nC)
    return Shares(kd_n, qh_nC, qh_nC.sum(1))


def _difference(p_nC: Tensor, q_nC: Tensor, d_nC: Tensor) -> Tensor:
    """``q - p`` with a relative error of rounding even where they nearly agree: max(p, q) sign(d) expm1(-|d|), d = log p - log q."""
    return torch.abs(d_nC).neg_().expm1_().mul_(torch.maximum(p_nC, q_nC)).mul_(d_nC.sign())


@dataclass(frozen=True, slots=True)
class Support:
    """A few ids per row, and everything else. Empty slots repeat a live slot of the row, so that scattering needs no mask."""

    ids: Tensor  # [n, K]
    live: Tensor  # [n, K] bool
    values: Tensor  # [n, K] logits at the ids, as they were before the fill
    twin: Tensor  # [n, 1] a live slot
    off_max: Tensor  # [n, 1] the largest logit outside the support (0 where nothing is outside)
    vocabulary: Whole = WHOLE  # of which these columns are a part

    def scatter(self, z_nV: Tensor, g_nK: Tensor) -> None:
        """Write ``g_nK`` at the ids; a row's empty slots write what their twin writes."""
        self.vocabulary.put(z_nV, self.ids, torch.where(self.live, g_nK, g_nK.gather(1, self.twin)))


def take_ids(z_nV: Tensor, ids_nK: Tensor, vocabulary: Whole = WHOLE) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Read the logits at ``ids_nK`` (-1 is an empty slot) and put -inf in their places; the first four fields of `Support`, whose values
    are to be added up over the ranks.

    A row without any id gets id 0 as its support: such rows carry no signal, and what is left of their softmax stays right.
    """
    live_nK = ids_nK >= 0
    twin_n1 = live_nK.to(torch.uint8).argmax(1, keepdim=True)
    live_nK = live_nK.scatter(1, twin_n1, True)
    ids_nK = ids_nK.clamp(min=0)
    ids_nK = torch.where(live_nK, ids_nK, ids_nK.gather(1, twin_n1))
    values_nK = vocabulary.gather(z_nV, ids_nK)
    vocabulary.put(z_nV, ids_nK, -torch.inf)
    return ids_nK, live_nK, values_nK, twin_n1


def take_support(z_nV: Tensor, ids_nK: Tensor, vocabulary: Whole = WHOLE) -> Support:
    """What `take_ids` does, and the largest logit outside the support, of all ranks."""
    taken = take_ids(z_nV, ids_nK, vocabulary)
    (off_max_n1,) = vocabulary.max(z_nV.amax(1, keepdim=True))
    return Support(*taken, off_max_n1.masked_fill(off_max_n1 == -torch.inf, 0.0), vocabulary)


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
