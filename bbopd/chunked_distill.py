"""`linear_distill` on a GPU: a chunk's logits by matrix product, an engine's row kernels for loss and gradient, two products more.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` ids of a
support, ``C = K + 1`` classes with the tail bucket.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.chunked_logits import CHUNK_LOGITS, FullTeacherRows, Logits, RowKernels, Rows, multiply
from bbopd.reference_distill import Distillation, Head
from bbopd.reference_math import Support, support_log_probs, take_ids

_CHUNK_TOKENS = 2048  # at least: with fewer tokens adding up dW costs as much as its product
_SLAB = 2**24  # 64 MB of float32: a chunk's share of dW, a few rows of the vocabulary at a time


def run(
    kernels: RowKernels, case: Distillation, needs_hidden: bool, needs_weight: bool, needs_bias: bool, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the losses of ``case``; the gradients of hidden [N, D], weight [V, D] and bias [V], each rounded once.

    Logits of ``chunk_tokens`` tokens exist at a time; 0 takes as many as make 512 MB, but 2,048 or more.
    """
    student, device = case.student, case.ce.device
    N, V = student.hidden.shape[0], student.weight.shape[0]
    chunk = min(chunk_tokens or max(_CHUNK_TOKENS, CHUNK_LOGITS // V), max(N, 1))
    hidden_dtype, weight_dtype = (gradient_dtype(tensor.dtype) for tensor in (student.hidden, student.weight))
    dH_ND = torch.empty(student.hidden.shape if needs_hidden else (0,), dtype=hidden_dtype, device=device)
    dW_VD = torch.zeros(student.weight.shape if needs_weight else (0,), dtype=torch.float32, device=device)
    db_V = torch.zeros((V,) if needs_bias else (0,), dtype=torch.float32, device=device)
    needs_grad = needs_hidden or needs_weight or needs_bias
    logits = Logits(kernels, student, chunk)
    teacher_logits = Logits(kernels, case.teacher, chunk) if isinstance(case.teacher, Head) else None
    grad_dtype = torch.bfloat16 if hidden_dtype == weight_dtype == torch.bfloat16 else torch.float32
    in_place = grad_dtype == torch.float32 or not kernels.rounds or not needs_grad
    grad_nS = logits.buffer if in_place else torch.empty_like(logits.buffer, dtype=grad_dtype)
    with torch.accelerator.device_index(device.index):
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            n = rows.stop - start
            teacher = None
            if teacher_logits is not None:
                teacher = teacher_logits.write(rows)
            elif isinstance(case.teacher, Tensor):
                teacher = case.teacher[rows]
                teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
            part = _Chunk(kernels, case, rows, logits.write(rows), V, grad_nS[:n] if needs_grad else None)
            if case.ids is not None and not case.is_sampled:
                part.on_support()
            else:
                part.dense(teacher)
            grad_nV = grad_nS[:n, :V].to(grad_dtype)
            if needs_hidden:
                multiply(grad_nV, student.weight, dH_ND[rows])
            if needs_weight:
                _accumulate(dW_VD, grad_nV, student.hidden[rows])
            if needs_bias:
                db_V += grad_nV.sum(0, dtype=torch.float32)
    return dH_ND, dW_VD.to(weight_dtype), db_V


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 has no room for the gradient of a mean before a loss scale has come in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class _Chunk:
    """The logits of ``rows``, [n, S], from which the losses of ``case`` are filled in and the gradient, [n, S], is written."""

    def __init__(self, kernels: RowKernels, case: Distillation, rows: slice, z_nS: Tensor, V: int, grad_nS: Tensor | None) -> None:
        self.kernels, self.case, self.rows, self.z_nS, self.V, self.grad_nS = kernels, case, rows, z_nS, V, grad_nS
        self.z_nV = z_nS[:, :V]
        self.label_n1 = case.label_ids(rows)
        self.label_z_n1 = self.z_nV.gather(1, self.label_n1)

    def dense(self, teacher: Tensor | None) -> None:
        """A teacher of all logits, [n, V or more]; without one a sampled token, or cross-entropy alone."""
        case, rows = self.case, self.rows
        statistics_3n = self.kernels.statistics(self.z_nS, self.V, case.temperature, at_one=case.labels is not None)
        statistics_3n[1:].log_()
        max_n1, log_sum_n1, log_sum_1_n1 = statistics_3n[:, :, None]
        case.check_student(max_n1 / case.temperature + log_sum_n1, rows)
        if case.labels is not None:
            case.fill_ce(max_n1 + log_sum_1_n1 - self.label_z_n1, rows)
        if teacher is not None:
            self._full(teacher, statistics_3n)
        elif case.is_sampled:
            assert case.ids is not None
            ids_n1 = case.ids[rows]
            log_q_n1 = (self.z_nV.gather(1, ids_n1) - max_n1) / case.temperature - log_sum_n1
            self._gradient(statistics_3n, -case.sampled_kd(log_q_n1, rows) * case.kd_grad[rows], ids_n1.contiguous())
        else:
            self._gradient(statistics_3n)

    def _full(self, teacher: Tensor, statistics_3n: Tensor) -> None:
        case, rows = self.case, self.rows
        signal = case.signal[rows].contiguous() if case.mask_rows else None
        teacher_3n = self.kernels.statistics(teacher, self.V, case.temperature, signal=signal, is_teacher=True)
        teacher_3n[1:].log_()
        if case.check:
            op_checks.check_teacher_rows(teacher_3n[0] / case.temperature + teacher_3n[1], rows.start)
        # a divergence reads NaN as a masked token; nobody shall take its row for a good one
        broken_n = 0.0 * (statistics_3n[1] + teacher_3n[1])
        mix = case.beta if case.divergence == "jsd" else case.skew
        full = FullTeacherRows(teacher, teacher_3n, signal, case.divergence, mix)
        kd_n, floored_n = self.kernels.divergence(self._rows(statistics_3n, case.kd_grad[rows] + broken_n[:, None], teacher=full))
        case.kd[rows] = torch.where(case.signal[rows], kd_n + broken_n, 0.0)
        case.floored[rows] = torch.where(case.signal[rows], floored_n.long(), 0)

    def on_support(self) -> None:
        """A teacher of some ids: they leave the row, so that the tail is a sum of what is left, and come back as gradients."""
        case, rows = self.case, self.rows
        assert case.ids is not None
        taken = take_ids(self.z_nV, case.ids[rows])
        statistics_3n = self.kernels.statistics(self.z_nS, self.V, case.temperature, at_one=case.labels is not None)
        off_max_n1, sum_n1, sum_1_n1 = statistics_3n[:, :, None]
        support = Support(*taken, off_max_n1)
        log_q_nC, lse_n1 = support_log_probs(support, sum_n1, case.temperature)
        case.check_student(lse_n1, rows)
        grad_nC = case.support_kd(log_q_nC, rows)
        grad_nK = grad_nC[:, :-1]
        # inside the tail the student's own proportions stay: q_v / q_tail of the bucket's gradient
        statistics_3n = torch.stack([off_max_n1, sum_n1.clamp(min=0.5).log(), sum_1_n1])[:, :, 0]
        if case.labels is not None:
            log_q1_nC, lse_1_n1 = support_log_probs(support, sum_1_n1, 1.0)
            case.fill_ce(lse_1_n1 - self.label_z_n1, rows)
            statistics_3n[2] = (lse_1_n1 - off_max_n1)[:, 0]
            grad_nK = grad_nK + case.ce_grad[rows] * (log_q1_nC[:, :-1].exp() - (support.ids == self.label_n1).float())
        self._gradient(statistics_3n, grad_nC[:, -1:].contiguous())
        if self.grad_nS is not None:
            if case.student.softcap is not None:
                grad_nK = grad_nK * (1.0 - (support.values / case.student.softcap).square())
            support.scatter(self.grad_nS[:, : self.V], grad_nK.to(self.grad_nS.dtype))

    def _gradient(self, statistics_3n: Tensor, kd_grad: Tensor | None = None, ids: Tensor | None = None) -> None:
        if self.grad_nS is not None:
            self.kernels.gradient(self._rows(statistics_3n, kd_grad, ids))

    def _rows(
        self, statistics_3n: Tensor, kd_grad: Tensor | None, ids: Tensor | None = None, teacher: FullTeacherRows | None = None
    ) -> Rows:
        case, has_labels = self.case, self.case.labels is not None
        return Rows(
            logits=self.z_nS,
            V=self.V,
            temperature=case.temperature,
            statistics=statistics_3n,
            gradient=self.grad_nS,
            labels=self.label_n1 if has_labels else None,
            ce_grad=case.ce_grad[self.rows] if has_labels else None,
            kd_grad=kd_grad,
            ids=ids,
            softcap=case.student.softcap,
            teacher=teacher,
        )


def _accumulate(dW_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """Add ``grad_nV.T @ hidden_nD``, without a second tensor of that size."""
    V, D = dW_VD.shape
    slab = max(128, _SLAB // D)
    room = torch.empty(min(slab, V), D, dtype=torch.float32, device=dW_VD.device)
    for first in range(0, V, slab):
        part_VD = dW_VD[first : first + slab]
        part_VD += multiply(grad_nV[:, first : first + slab].t(), hidden_nD, room[: part_VD.shape[0]])
