"""`linear_distill`, chunk by chunk: logits, loss and gradients of a chunk of tokens, then the next.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk or of a block of its rows, ``D`` hidden, ``V`` vocabulary in use, ``K`` ids of a
support, ``C = K + 1`` classes with the tail bucket. A chunk is large, to make few passes over dW; a block fits in cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.reference_math import (
    LOG_P_FLOOR,
    RATIO_CAP,
    Shares,
    divergence,
    divergence_shares,
    exponentials,
    normalise,
    support_log_probs,
    take_support,
    temper_teacher,
)
from bbopd.reference_vocabulary import Whole
from bbopd.types import Divergence

METRICS = {
    "ce_tokens": ("none", "full", "topk", "sampled"),
    "kd_tokens": ("none", "full", "topk", "sampled"),
    "floored": ("full", "topk"),
    "teacher_tail_mass": ("topk",),
    "importance_ratio": ("sampled",),
    "ratio_capped": ("sampled",),
}
"""Each metric, in the order in which they are returned, and the kinds of teacher that it says something of."""


@dataclass(frozen=True, slots=True)
class Head:
    """What makes logits: ``softcap(scale * (hidden @ weight.T + bias))``, of ``V`` tokens."""

    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    bias: Tensor | None  # [V]
    scale: float
    softcap: float | None

    def to(self, dtype: torch.dtype) -> Head:
        """The same with weight and bias in the compute dtype, as `write_logits` needs them."""
        return replace(self, weight=self.weight.to(dtype), bias=None if self.bias is None else self.bias.to(dtype))

    def write_logits(self, rows: slice, z_nV: Tensor) -> None:
        if self.weight.shape[0] == 0:  # a rank without a token of its own: one that has no probability stands in
            z_nV.fill_(-torch.inf)
            return
        hidden_nD = self.hidden[rows].to(z_nV.dtype)
        if self.bias is None:
            torch.mm(hidden_nD, self.weight.t(), out=z_nV)
        else:
            torch.addmm(self.bias, hidden_nD, self.weight.t(), out=z_nV)
        if self.softcap is not None:
            z_nV.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        elif self.scale != 1.0:
            z_nV.mul_(self.scale)


def head_of(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None, vocab_size: int) -> Head:
    """A head over the first ``vocab_size`` tokens: a padded logit is never computed, so it has no probability and no gradient."""
    return Head(hidden, weight[:vocab_size], None if bias is None else bias[:vocab_size], scale, softcap)


def chunk_rows(vocab_size: int, device: torch.device) -> tuple[int, int]:
    """Tokens of a chunk and of a block: 64 MB of logits and 2 MB on a CPU, 512 MB and as much on a GPU."""
    chunk, block = (2**24, 2**19) if device.type == "cpu" else (2**27, 2**27)
    return max(16, chunk // vocab_size), max(1, block // vocab_size)


@dataclass(slots=True)
class Distillation:
    """One call of `linear_distill`: its inputs, and the per-token results that its blocks fill in."""

    student: Head
    rows: int  # of the whole weight: V, and padding
    vocabulary: Whole  # of which V is all, or a part
    teacher: Head | Tensor | None  # a full teacher: its head, or its logits [N, V]
    ids: Tensor | None  # [N, K] the teacher's support, or [N, 1] the sampled tokens
    logprobs: Tensor | None  # [N, K]
    extra: Tensor | None  # [N] log_tail, or the sampler's logprobs
    is_sampled: bool
    labels: Tensor | None  # [N]
    has_label: Tensor  # [N] bool
    signal: Tensor  # [N] bool
    mask_rows: bool  # whether some tokens may carry no signal
    temperature: float
    divergence: Divergence
    beta: float
    skew: float
    check: bool
    ce_grad: Tensor  # [N, 1] dloss/dCE, times dz/d(hidden @ weight.T) without the cap's slope
    kd_grad: Tensor  # [N, 1] dloss/dKD, times du/dz and the same
    ce: Tensor  # [N]
    kd: Tensor  # [N], without T^2
    floored: Tensor  # [N] int64
    ratio: Tensor  # [N]

    def block(self, z_nV: Tensor, teacher_nV: Tensor | None, rows: slice, needs_grad: bool) -> None:
        """Fill in the loss of ``rows`` and turn their logits into gradients by ``hidden @ weight.T``, in place."""
        cap = self.student.softcap
        slope_nV = (z_nV / cap).square_().neg_().add_(1.0) if cap is not None and needs_grad else None
        if self.ids is not None and not self.is_sampled:
            self._support_block(z_nV, rows, needs_grad)
        else:
            self._dense_block(z_nV, teacher_nV, rows, needs_grad)
        if slope_nV is not None:
            z_nV.mul_(slope_nV)

    def _dense_block(self, z_nV: Tensor, teacher_nV: Tensor | None, rows: slice, needs_grad: bool) -> None:
        vocabulary, label_n1 = self.vocabulary, self.label_ids(rows)
        label_z_n1 = vocabulary.gather(z_nV, label_n1)
        log_probs = [z_nV * (1.0 / self.temperature)]  # as for the teacher, so that equal logits give a divergence of 0
        if teacher_nV is not None:
            if self.mask_rows:
                teacher_nV.masked_fill_(~self.signal[rows, None], 0.0)
            log_probs.append(temper_teacher(teacher_nV, self.temperature))
        probs = [torch.empty_like(u_nV) for u_nV in log_probs]
        maxima = vocabulary.max(*(u_nV.amax(1, keepdim=True) for u_nV in log_probs))
        softmaxes = list(zip(log_probs, maxima, probs, strict=True))
        label_z_n1, *sums = vocabulary.sum(label_z_n1, *(exponentials(*softmax) for softmax in softmaxes))
        lses = [max_n1 + normalise(u_nV, p_nV, sum_n1) for (u_nV, max_n1, p_nV), sum_n1 in zip(softmaxes, sums, strict=True)]
        log_q_nV, q_nV, max_n1, lse_n1 = log_probs[0], probs[0], maxima[0], lses[0]
        self.check_student(lse_n1, rows)

        shares = floored_n = id_log_q_n1 = power_sum_n1 = None
        if self.is_sampled:
            assert self.ids is not None
            id_log_q_n1 = vocabulary.gather(log_q_nV, self.ids[rows])
        elif teacher_nV is not None:
            if self.check:
                op_checks.check_teacher_rows(lses[1][:, 0], rows.start)
            floored_n = self._floored(teacher_nV, log_q_nV)
            shares = divergence_shares(teacher_nV, log_q_nV, probs[1], q_nV, self.divergence, self.beta, self.skew)
        if self.labels is not None and self.temperature != 1.0:
            # exponentials at temperature 1, from the probabilities at T where that is free: exp(z) = exp(z/2)^2
            if self.temperature == 2.0:
                torch.mul(q_nV, q_nV, out=z_nV)
            else:
                z_nV.sub_(max_n1 * self.temperature).exp_()
            power_sum_n1 = z_nV.sum(1, keepdim=True)
        kd_n, mean_n = (None, None) if shares is None else (shares.kd, shares.mean)
        kd_n, mean_n, floored_n, id_log_q_n1, power_sum_n1 = vocabulary.sum(kd_n, mean_n, floored_n, id_log_q_n1, power_sum_n1)
        grad_nV: Tensor | None = None
        if id_log_q_n1 is not None:
            grad_nV = self._sampled_grad(id_log_q_n1, q_nV, rows)
        elif shares is not None:
            grad_nV = self._full_grad(shares, kd_n, mean_n, floored_n, q_nV, rows)
        if self.labels is None:
            if grad_nV is None:
                z_nV.zero_()
            else:
                torch.mul(grad_nV, self.kd_grad[rows], out=z_nV)
            return
        sum_n1 = torch.ones_like(lse_n1) if power_sum_n1 is None else power_sum_n1
        if self.temperature == 1.0:
            z_nV.copy_(q_nV)
        else:
            lse_n1 = 2.0 * lse_n1 if self.temperature == 2.0 else max_n1 * self.temperature
            lse_n1 = lse_n1 + sum_n1.log()
        self.fill_ce(lse_n1 - label_z_n1, rows)
        if needs_grad:
            z_nV.mul_(self.ce_grad[rows] / sum_n1)
            if grad_nV is not None:
                z_nV.addcmul_(grad_nV, self.kd_grad[rows])
            vocabulary.add(z_nV, label_n1, -self.ce_grad[rows])

    def _full_grad(
        self, shares: Shares, kd_n: Tensor, mean_n: Tensor | None, floored_n: Tensor | None, q_nV: Tensor, rows: slice
    ) -> Tensor:
        self.kd[rows] = torch.where(self.signal[rows], kd_n, 0.0)
        self._fill_floored(floored_n, rows)
        return shares.gradient(mean_n, q_nV)

    def _sampled_grad(self, log_q_n1: Tensor, q_nV: Tensor, rows: slice) -> Tensor:
        assert self.ids is not None
        kd_n1 = self.sampled_kd(log_q_n1, rows)
        grad_nV = torch.mul(q_nV, -kd_n1)
        self.vocabulary.add(grad_nV, self.ids[rows], kd_n1)
        return grad_nV

    def sampled_kd(self, log_q_n1: Tensor, rows: slice) -> Tensor:
        """Reverse KL by policy gradient: ``-min(q/q_old, cap) (log p - log q_old)`` from ``log q`` of the sampled tokens, [n, 1].

        Its gradient goes through the ratio alone: ``kd (onehot - q)`` by the tempered logits. The truncated ratio is a weight, so that the
        gradient keeps its direction beyond the cap.
        """
        assert self.logprobs is not None
        assert self.extra is not None
        signal_n1, behavior_n1 = self.signal[rows, None], self.extra[rows, None]
        advantage_n1 = self.logprobs[rows] - behavior_n1
        ratio_n1 = torch.where(signal_n1, (log_q_n1 - behavior_n1).exp(), 1.0)
        kd_n1 = torch.where(signal_n1, -ratio_n1.clamp(max=RATIO_CAP) * advantage_n1, 0.0)
        self.kd[rows], self.ratio[rows] = kd_n1[:, 0], ratio_n1[:, 0]
        return kd_n1

    def _support_block(self, z_nV: Tensor, rows: slice, needs_grad: bool) -> None:
        assert self.ids is not None
        vocabulary, label_n1 = self.vocabulary, self.label_ids(rows)
        label_z_n1 = vocabulary.gather(z_nV, label_n1)
        support = take_support(z_nV, self.ids[rows], vocabulary)
        off_nV = torch.sub(z_nV, support.off_max)
        if self.temperature != 1.0:
            off_nV.mul_(1.0 / self.temperature)
        off_nV.exp_()
        off_sum_n1, power_sum_n1 = off_nV.sum(1, keepdim=True), None
        if self.labels is not None and self.temperature != 1.0:
            if self.temperature == 2.0:
                torch.mul(off_nV, off_nV, out=z_nV)
            else:
                z_nV.sub_(support.off_max).exp_()
            power_sum_n1 = z_nV.sum(1, keepdim=True)
        off_sum_n1, power_sum_n1, label_z_n1, values_nK = vocabulary.sum(off_sum_n1, power_sum_n1, label_z_n1, support.values)
        support = replace(support, values=values_nK)
        log_q_nC, lse_n1 = support_log_probs(support, off_sum_n1, self.temperature)
        self.check_student(lse_n1, rows)

        # inside the tail the student's own proportions stay: its gradient is the bucket's, spread by q_v / q_tail
        grad_nC = self.support_kd(log_q_nC, rows)
        tail_n1 = grad_nC[:, -1:] / off_sum_n1.clamp(min=0.5)  # off_sum is 1 or more, or 0 where nothing is outside
        if self.labels is None:
            torch.mul(off_nV, tail_n1, out=z_nV)
            support.scatter(z_nV, grad_nC[:, :-1])
            return
        log_q1_nC, lse_n1 = support_log_probs(support, off_sum_n1 if power_sum_n1 is None else power_sum_n1, 1.0)
        self.fill_ce(lse_n1 - label_z_n1, rows)
        if needs_grad:
            ce_grad_n1 = self.ce_grad[rows]
            off_ce_n1 = (support.off_max - lse_n1).exp() * ce_grad_n1
            if self.temperature == 1.0:
                torch.mul(off_nV, tail_n1 + off_ce_n1, out=z_nV)
            else:
                z_nV.mul_(off_ce_n1).addcmul_(off_nV, tail_n1)
            support.scatter(z_nV, grad_nC[:, :-1].addcmul_(log_q1_nC[:, :-1].exp(), ce_grad_n1))
            vocabulary.add(z_nV, label_n1, -ce_grad_n1)

    def support_kd(self, log_q_nC: Tensor, rows: slice) -> Tensor:
        """Fill in the divergence of ``rows`` on their supports and tails; its gradient by the products of the logits, [n, C]."""
        assert self.ids is not None
        assert self.logprobs is not None
        assert self.extra is not None
        # a tail that is empty by construction (K = V) can hold no mass of the teacher's either
        ids_nK = self.ids[rows]
        has_ids_n = (ids_nK >= 0).any(1)
        log_tail_n1 = self.extra[rows, None].masked_fill(log_q_nC[:, -1:] == -torch.inf, -torch.inf)
        log_p_nC = torch.cat([self.logprobs[rows].masked_fill(ids_nK < 0, -torch.inf), log_tail_n1], 1)
        log_p_nC -= log_p_nC.logsumexp(1, keepdim=True)
        carries_n = self.signal[rows] & has_ids_n  # without any id the one bucket is everything, and its divergence 0
        log_p_nC = torch.where(carries_n[:, None], log_p_nC, log_q_nC)
        self._fill_floored(self._floored(log_p_nC, log_q_nC), rows)
        kd_n, grad_nC = divergence(log_p_nC, log_q_nC, log_p_nC.exp(), log_q_nC.exp(), self.divergence, self.beta, self.skew)
        self.kd[rows] = torch.where(carries_n, kd_n, 0.0)
        return torch.where(carries_n[:, None], grad_nC, 0.0) * self.kd_grad[rows]

    def label_ids(self, rows: slice) -> Tensor:
        """Labels [n, 1]; 0 where there is none, whose weight is 0."""
        if self.labels is None:
            return torch.zeros_like(self.has_label[rows, None], dtype=torch.int64)
        return torch.where(self.has_label[rows], self.labels[rows], 0)[:, None].long()

    def fill_ce(self, ce_n1: Tensor, rows: slice) -> None:
        self.ce[rows] = torch.where(self.has_label[rows], ce_n1[:, 0], 0.0)

    def _floored(self, log_p_nC: Tensor, log_q_nC: Tensor) -> Tensor | None:
        return ((log_p_nC < LOG_P_FLOOR) & (log_q_nC > -torch.inf)).sum(1) if self.divergence == "reverse_kl" else None

    def _fill_floored(self, floored_n: Tensor | None, rows: slice) -> None:
        if floored_n is not None:
            self.floored[rows] = torch.where(self.signal[rows], floored_n, 0)

    def check_student(self, lse_n1: Tensor, rows: slice) -> None:
        if self.check:
            op_checks.check_student_rows(lse_n1[:, 0], rows.start)


def run(case: Distillation, needs_hidden: bool, needs_weight: bool, needs_bias: bool, chunk_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the losses of ``case`` and return the gradients of hidden [N, D], weight [V, D] and bias [V] (empty where not needed)."""
    dtype, device = case.ce.dtype, case.ce.device
    student = case.student = case.student.to(dtype)
    teacher = case.teacher.to(dtype) if isinstance(case.teacher, Head) else case.teacher
    N, V = student.hidden.shape[0], student.weight.shape[0]
    widest = case.vocabulary.widest
    chunk, block = chunk_rows(widest or V, device)
    chunk = min(chunk_tokens or chunk, max(N, 1))
    if widest is not None:  # each block is reduced over the ranks: few and large ones
        block = chunk
    dH_ND = torch.empty(student.hidden.shape if needs_hidden else (0,), dtype=dtype, device=device)
    dW_VD = torch.zeros(student.weight.shape if needs_weight else (0,), dtype=dtype, device=device)
    db_V = torch.zeros((V,) if needs_bias else (0,), dtype=dtype, device=device)
    needs_grad = needs_hidden or needs_weight or needs_bias
    buffer_nV = torch.empty(chunk, max(V, 1), dtype=dtype, device=device)
    teacher_nV = torch.empty_like(buffer_nV) if isinstance(teacher, Head) else None
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        z_nV = buffer_nV[: rows.stop - start]
        student.write_logits(rows, z_nV)
        if isinstance(teacher, Head):
            assert teacher_nV is not None
            teacher.write_logits(rows, teacher_nV[: rows.stop - start])
        for first in range(start, rows.stop, block):
            part = slice(first, min(first + block, rows.stop))
            local = slice(part.start - start, part.stop - start)
            if teacher_nV is not None:
                teacher_block = teacher_nV[local]
            elif isinstance(teacher, Tensor):
                teacher_block = teacher[part, :V].to(dtype, copy=True) if V else torch.full_like(z_nV[local], -torch.inf)
            else:
                teacher_block = None
            case.block(z_nV[local], teacher_block, part, needs_grad)
        z_nV = z_nV[:, :V]
        if needs_hidden:
            torch.mm(z_nV, student.weight, out=dH_ND[rows])
        if needs_weight:
            dW_VD.addmm_(z_nV.t(), student.hidden[rows].to(dtype))
        if needs_bias:
            db_V += z_nV.sum(0)
    if needs_hidden:
        case.vocabulary.sum_in_place(dH_ND)
    return dH_ND, dW_VD, db_V
