"""`linear_distill` in C++: tensors made ready for the kernels, and what comes back.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary in use, ``K`` ids of a support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.cpu_memory import stash_megabytes
from bbopd.cpu_tensors import LEVELS, TYPES, HeadTuple, address_of, cpu_level, floats_of, head_tuple, matrix_of, rows_of
from bbopd.reference import linear_distill_with, register
from bbopd.reference_distill import Distillation, Head
from bbopd.types import DIVERGENCES, DistillLoss

_NONE, _FULL, _SUPPORT, _SAMPLED = range(4)


def linear_distill(*arguments: Any, **options: Any) -> DistillLoss:
    """`bbopd.ops.linear_distill`, on arguments of the right shapes and dtypes, those that `bbopd.cpu_tensors.takes` accepts."""
    return linear_distill_with(_linear_distill, 0, *arguments, **options)


def run(case: Distillation, needs_hidden: bool, needs_weight: bool, needs_bias: bool, stash_bytes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in the losses of ``case``; the gradients of hidden [N, D], weight and bias [V or more], each rounded once."""
    from bbopd._C import linear_distill as distill

    student, teacher = _readable(case.student), _readable(case.teacher) if isinstance(case.teacher, Head) else None
    teacher_logits = rows_of(case.teacher) if isinstance(case.teacher, Tensor) else None
    hidden, weight = student.hidden, student.weight
    N, V = hidden.shape[0], weight.shape[0]
    label_N = None if case.labels is None else torch.where(case.has_label, case.labels, -1).long().contiguous()
    ids, signal = case.ids, _NONE
    if case.is_sampled:
        signal = _SAMPLED
    elif ids is not None:
        signal = _SUPPORT
        ids = ids.masked_fill(~case.signal[:, None], -1) if case.mask_rows else ids
    elif case.teacher is not None:
        signal = _FULL
    id_NK = None if ids is None else ids.contiguous()
    logprob_NK, extra_N = floats_of(case.logprobs), floats_of(case.extra)
    ce_grad_N, kd_grad_N = case.ce_grad.contiguous(), case.kd_grad.contiguous()
    signal_N = case.signal.to(torch.uint8).contiguous()
    student_lse_N, teacher_lse_N = torch.zeros(N), torch.zeros(N)
    floored_N = torch.zeros(N, dtype=torch.int32)
    dH_ND = _gradient(hidden.shape, hidden.dtype) if needs_hidden else hidden.new_empty(0)
    dW_VD = _gradient(torch.Size((case.rows, weight.shape[1])), weight.dtype) if needs_weight else weight.new_empty(0)
    db_V = torch.zeros(V if needs_bias else 0)
    if needs_weight:
        dW_VD[V:] = 0
    distill(
        {
            "N": N,
            "V": V,
            "K": id_NK.shape[1] if signal == _SUPPORT and id_NK is not None else 1,
            "student": _tuple_of(student),
            "signal": signal,
            "teacher_logits": matrix_of(teacher_logits),
            "teacher": _tuple_of(teacher),
            "ids": address_of(id_NK),
            "logprobs": address_of(logprob_NK),
            "extra": address_of(extra_N),
            "labels": address_of(label_N),
            "has_signal": address_of(signal_N),
            "ce_grad": address_of(ce_grad_N),
            "kd_grad": address_of(kd_grad_N),
            "temperature": case.temperature,
            "divergence": DIVERGENCES.index(case.divergence),
            "beta": case.beta,
            "skew": case.skew,
            "stash_bytes": stash_bytes or int(stash_megabytes() * 2**20),
            "threads": torch.get_num_threads(),
            "level": LEVELS.index(cpu_level()),
            "ce": address_of(case.ce),
            "kd": address_of(case.kd),
            "ratio": address_of(case.ratio),
            "student_lse": address_of(student_lse_N),
            "teacher_lse": address_of(teacher_lse_N),
            "floored": address_of(floored_N),
            "hidden_grad": address_of(dH_ND) if needs_hidden and N else 0,
            "weight_grad": address_of(dW_VD) if needs_weight else 0,
            "bias_grad": address_of(db_V) if needs_bias else 0,
            "hidden_grad_type": TYPES.get(dH_ND.dtype, 0),
            "weight_grad_type": TYPES.get(dW_VD.dtype, 0),
        }
    )
    case.floored.copy_(floored_N)
    op_checks.check_student_rows(student_lse_N, 0)
    if signal == _FULL:
        op_checks.check_teacher_rows(torch.where(case.signal, teacher_lse_N, 0.0), 0)
    return dH_ND, dW_VD, db_V


def _readable(head: Head) -> Head:
    """The head with matrices of contiguous rows and a bias in float32: tensors that must live as long as their addresses."""
    return Head(rows_of(head.hidden), rows_of(head.weight), floats_of(head.bias), head.scale, head.softcap)


def _tuple_of(head: Head | None) -> HeadTuple:
    if head is None:
        return head_tuple(None, None, None, 1.0, None)
    return head_tuple(head.hidden, head.weight, head.bias, head.scale, head.softcap)


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory comes back into use when the tensor is gone: pages that are new cost as much as a product."""
    from bbopd._C import Buffer

    dtype, count = _gradient_dtype(dtype), shape.numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(Buffer(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


_linear_distill = register("bbopd::linear_distill_cpu", run, lambda dtype, _: _gradient_dtype(dtype))
