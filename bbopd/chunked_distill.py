"""`linear_distill` on a GPU: a chunk's logits by matrix product, an engine's row kernels for loss and gradient, two products more.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` ids of a
support, ``C = K + 1`` classes with the tail bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.chunked_logits import CHUNK_LOGITS, FullTeacherRows, Logits, RowKernels, Rows, multiply
from bbopd.reference_distill import Distillation, Head
from bbopd.reference_math import Support, support_log_probs, take_ids
from bbopd.reference_vocabulary import Whole

_CHUNK_TOKENS = 2048  # at least: with fewer tokens adding up dW costs as much as its product
_SLAB = 2**24  # 64 MB of float32: a chunk's share of dW, a few rows of the vocabulary at a time


def run(
    kernels: RowKernels, case: Distillation, needs_hidden: bool, needs_weight: bool, needs_bias: bool, chunk_tokens: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the losses of ``case``; the gradients of hidden [N, D], weight [V, D] and bias [V], each rounded once.

    Logits of ``chunk_tokens`` tokens exist at a time; 0 takes as many as make 512 MB, but 2,048 or more.
    """
    student, device, widest = case.student, case.ce.device, case.vocabulary.widest
    N, V = student.hidden.shape[0], student.weight.shape[0]
    chunk = min(chunk_tokens or tokens_of_chunk(widest or V), max(N, 1))
    hidden_dtype, weight_dtype = (gradient_dtype(tensor.dtype) for tensor in (student.hidden, student.weight))
    # the ranks' parts are added up before they are rounded
    dH_dtype = hidden_dtype if widest is None else torch.float32
    dH_ND = torch.empty(student.hidden.shape if needs_hidden else (0,), dtype=dH_dtype, device=device)
    dW_VD = torch.zeros(student.weight.shape if needs_weight else (0,), dtype=torch.float32, device=device)
    db_V = torch.zeros((V,) if needs_bias else (0,), dtype=torch.float32, device=device)
    grad_dtype = torch.bfloat16 if hidden_dtype == weight_dtype == torch.bfloat16 else torch.float32
    gradients = (dH_ND if needs_hidden else None, dW_VD if needs_weight else None, db_V if needs_bias else None)
    _run_chunks(kernels, case, chunk, grad_dtype, *gradients)  # whose logits are gone before the gradients are rounded
    if needs_hidden:
        case.vocabulary.sum_in_place(dH_ND)
    return dH_ND.to(hidden_dtype), dW_VD.to(weight_dtype), db_V


def tokens_of_chunk(vocabulary: int) -> int:
    """How many tokens have their logits at a time, of a head with ``vocabulary`` rows."""
    return max(_CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)


def _run_chunks(
    kernels: RowKernels,
    case: Distillation,
    chunk: int,
    grad_dtype: torch.dtype,
    dH_ND: Tensor | None,
    dW_VD: Tensor | None,
    db_V: Tensor | None,
) -> None:
    """Fill in the losses of ``case`` and the gradients that are there, ``chunk`` tokens at a time."""
    student, device = case.student, case.ce.device
    N, V = student.hidden.shape[0], student.weight.shape[0]
    needs_grad = any(gradient is not None for gradient in (dH_ND, dW_VD, db_V))
    logits = Logits(kernels, student, chunk)
    teacher_logits = Logits(kernels, case.teacher, chunk) if isinstance(case.teacher, Head) else None
    grad_nS = logits.gradient(grad_dtype)
    with torch.accelerator.device_index(device.index):
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            n = rows.stop - start
            teacher = None
            if teacher_logits is not None:
                teacher = teacher_logits.write(rows)
            elif isinstance(case.teacher, Tensor):
                teacher = case.teacher[rows] if V else torch.full((n, 1), -torch.inf, device=device)
                teacher = teacher if teacher.stride(1) == 1 else teacher.contiguous()
            part = _Chunk(kernels, case, rows, logits.write(rows), max(V, 1), grad_nS[:n] if needs_grad else None)
            if case.ids is not None and not case.is_sampled:
                part.on_support()
            else:
                part.dense(teacher)
            grad_nV = grad_nS[:n, :V]
            if dH_ND is not None:
                multiply(grad_nV, student.weight, dH_ND[rows])
            if dW_VD is not None:
                _accumulate(dW_VD, grad_nV, student.hidden[rows])
            if db_V is not None:
                db_V += grad_nV.sum(0, dtype=torch.float32)


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 has no room for the gradient of a mean before a loss scale has come in."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


class _Chunk:
    """The logits of ``rows``, [n, S], from which the losses of ``case`` are filled in and the gradient, [n, S], is written."""

    def __init__(self, kernels: RowKernels, case: Distillation, rows: slice, z_nS: Tensor, V: int, grad_nS: Tensor | None) -> None:
        self.kernels, self.case, self.rows, self.z_nS, self.V, self.grad_nS = kernels, case, rows, z_nS, V, grad_nS
        self.z_nV = z_nS[:, :V]
        self.label_n1 = case.label_ids(rows)
        self.label_z_n1 = case.vocabulary.gather(self.z_nV, self.label_n1)

    def dense(self, teacher: Tensor | None) -> None:
        """A teacher of all logits, [n, V or more]; without one a sampled token, or cross-entropy alone."""
        case, rows, vocabulary = self.case, self.rows, self.case.vocabulary
        signal = case.signal[rows].contiguous() if case.mask_rows else None
        statistics = [self.kernels.statistics(self.z_nS, self.V, case.temperature, at_one=case.labels is not None)]
        if teacher is not None:
            statistics.append(self.kernels.statistics(teacher, self.V, case.temperature, signal=signal, is_teacher=True))
        ids_n1 = case.ids[rows] if case.ids is not None else None
        id_z_n1 = None if ids_n1 is None else vocabulary.gather(self.z_nV, ids_n1)
        statistics, (label_z_n1, id_z_n1) = _of_whole_rows(vocabulary, case.temperature, statistics, self.label_z_n1, id_z_n1)
        for part_3n in statistics:
            part_3n[1:].log_()
        statistics_3n = statistics[0]
        max_n1, log_sum_n1, log_sum_1_n1 = statistics_3n[:, :, None]
        case.check_student(max_n1 / case.temperature + log_sum_n1, rows)
        if case.labels is not None:
            case.fill_ce(max_n1 + log_sum_1_n1 - label_z_n1, rows)
        if teacher is not None:
            self._full(teacher, signal, *statistics)
        elif ids_n1 is not None:
            log_q_n1 = (id_z_n1 - max_n1) / case.temperature - log_sum_n1
            kd_n1 = case.sampled_kd(log_q_n1, rows)
            self._gradient(statistics_3n, -kd_n1 * case.kd_grad[rows], vocabulary.columns_of(ids_n1).contiguous())
        else:
            self._gradient(statistics_3n)

    def _full(self, teacher: Tensor, signal: Tensor | None, statistics_3n: Tensor, teacher_3n: Tensor) -> None:
        case, rows = self.case, self.rows
        if case.check:
            op_checks.check_teacher_rows(teacher_3n[0] / case.temperature + teacher_3n[1], rows.start)
        # a divergence reads NaN as a masked token; nobody shall take its row for a good one
        broken_n = 0.0 * (statistics_3n[1] + teacher_3n[1])
        mix = case.beta if case.divergence == "jsd" else case.skew
        full = FullTeacherRows(teacher, teacher_3n, signal, case.divergence, mix)
        given = self._rows(statistics_3n, case.kd_grad[rows] + broken_n[:, None], teacher=full)
        # where the gradient has a mean, it waits for what the other ranks add to it
        waits = case.vocabulary.widest is not None and case.divergence != "forward_kl" and given.gradient is not None
        shares_3n = self.kernels.divergence(replace(given, gradient=None) if waits else given)
        kd_n, mean_n, floored_n = case.vocabulary.sum(*shares_3n)
        if waits:
            self.kernels.gradient(replace(given, mean=mean_n.contiguous()))
        case.kd[rows] = torch.where(case.signal[rows], kd_n + broken_n, 0.0)
        case.floored[rows] = torch.where(case.signal[rows], floored_n.long(), 0)

    def on_support(self) -> None:
        """A teacher of some ids: they leave the row, so that the tail is a sum of what is left, and come back as gradients."""
        case, rows = self.case, self.rows
        assert case.ids is not None
        ids_nK, live_nK, values_nK, twin_n1 = take_ids(self.z_nV, case.ids[rows], case.vocabulary)
        statistics_3n = self.kernels.statistics(self.z_nS, self.V, case.temperature, at_one=case.labels is not None)
        (statistics_3n,), (label_z_n1, values_nK) = _of_whole_rows(
            case.vocabulary, case.temperature, [statistics_3n], self.label_z_n1, values_nK
        )
        off_max_n1, sum_n1, sum_1_n1 = statistics_3n[:, :, None]
        support = Support(ids_nK, live_nK, values_nK, twin_n1, off_max_n1, case.vocabulary)
        log_q_nC, lse_n1 = support_log_probs(support, sum_n1, case.temperature)
        case.check_student(lse_n1, rows)
        grad_nC = case.support_kd(log_q_nC, rows)
        grad_nK = grad_nC[:, :-1]
        # inside the tail the student's own proportions stay: q_v / q_tail of the bucket's gradient
        statistics_3n = torch.stack([off_max_n1, sum_n1.clamp(min=0.5).log(), sum_1_n1])[:, :, 0]
        if case.labels is not None:
            log_q1_nC, lse_1_n1 = support_log_probs(support, sum_1_n1, 1.0)
            case.fill_ce(lse_1_n1 - label_z_n1, rows)
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
            labels=case.vocabulary.columns_of(self.label_n1) if has_labels else None,
            ce_grad=case.ce_grad[self.rows] if has_labels else None,
            kd_grad=kd_grad,
            ids=ids,
            softcap=case.student.softcap,
            teacher=teacher,
        )


def _of_whole_rows(
    vocabulary: Whole, temperature: float, statistics: list[Tensor], *values: Tensor | None
) -> tuple[list[Tensor], Sequence[Any]]:
    """The statistics, [3, n] each, of rows of all ranks from those of the columns here; beside them ``values``, added up."""
    if vocabulary.widest is None:
        return statistics, values
    # columns of nothing but -inf have a maximum of 0 and sums of 0
    tops = [local_3n[0, :, None].masked_fill(local_3n[1, :, None] == 0.0, -torch.inf) for local_3n in statistics]
    maxima = [max_n1.masked_fill(max_n1 == -torch.inf, 0.0) for max_n1 in vocabulary.max(*tops)]
    drops = [top_n1 - max_n1 for top_n1, max_n1 in zip(tops, maxima, strict=True)]
    sums = [
        local_3n[1:].t() * torch.cat([(drop_n1 / temperature).exp(), drop_n1.exp()], 1)
        for local_3n, drop_n1 in zip(statistics, drops, strict=True)
    ]
    added = vocabulary.sum(*sums, *values)
    count = len(statistics)
    whole = [torch.cat([max_n1, sums_n2], 1).t().contiguous() for max_n1, sums_n2 in zip(maxima, added[:count], strict=True)]
    return whole, added[count:]


def _accumulate(dW_VD: Tensor, grad_nV: Tensor, hidden_nD: Tensor) -> None:
    """Add ``grad_nV.T @ hidden_nD``, without a second tensor of that size."""
    V, D = dW_VD.shape
    slab = max(128, _SLAB // D)
    room = torch.empty(min(slab, V), D, dtype=torch.float32, device=dW_VD.device)
    for first in range(0, V, slab):
        part_VD = dW_VD[first : first + slab]
        part_VD += multiply(grad_nV[:, first : first + slab].t(), hidden_nD, room[: part_VD.shape[0]])
