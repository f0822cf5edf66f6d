"""`linear_distill` in C++: tensors made ready for the kernels, and what comes back.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary in use, ``K`` ids of a support.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.cpu_memory import stash_megabytes
from bbopd.cpu_tensors import LEVELS, TYPES, address_of, cpu_level, floats_of, head_tuple, matrix_of, rows_of
from bbopd.reference import TokenWeights, check_values, linear_distill_with, pad_vocabulary, save_gradients, scale_gradients
from bbopd.reference_distill import METRICS
from bbopd.reference_math import RATIO_CAP
from bbopd.types import DIVERGENCES, DistillLoss

_SIGNALS = ("none", "full", "topk", "sampled")


def linear_distill(*arguments: Any, **options: Any) -> DistillLoss:
    """`bbopd.ops.linear_distill`, on arguments of the right shapes and dtypes, those that `takes` accepts."""
    return linear_distill_with(_linear_distill, 0, *arguments, **options)


@torch.library.custom_op("bbopd::linear_distill_cpu", mutates_args=())
def _linear_distill(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    valid: Tensor | None,
    teacher_logits: Tensor | None,
    teacher_hidden: Tensor | None,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    extra: Tensor | None,
    weights: Tensor,
    kind: str,
    divergence: str,
    temperature: float,
    beta: float,
    skew: float,
    t2_scaling: bool,
    logit_scale: float,
    logit_softcap: float | None,
    teacher_scale: float,
    teacher_softcap: float | None,
    vocab_size: int,
    ignore_index: int,
    check: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    stash_bytes: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    from bbopd._C import linear_distill as distill

    check_values(labels, token_weight, normalizer, valid, ids, logprobs, extra, kind, vocab_size, ignore_index)
    N, V = hidden.shape[0], vocab_size
    factors = TokenWeights.of(
        hidden, labels, token_weight, normalizer, valid, weights, kind, temperature, t2_scaling, ignore_index, torch.float32
    )
    T = temperature if kind != "none" else 1.0
    hidden, weight = rows_of(hidden), rows_of(weight)
    teacher_logits, teacher_hidden, teacher_weight = (
        None if tensor is None else rows_of(tensor) for tensor in (teacher_logits, teacher_hidden, teacher_weight)
    )
    bias_V, teacher_bias_V = floats_of(bias), floats_of(teacher_bias)
    label_N = None if labels is None else torch.where(factors.has_label, labels, -1).long().contiguous()
    if kind == "topk" and ids is not None and valid is not None:
        ids = ids.masked_fill(~valid[:, None], -1)
    id_NK = None if ids is None else ids.long().contiguous()
    logprob_NK, extra_N = floats_of(logprobs), floats_of(extra)
    ce_grad_N = (factors.ce * logit_scale).contiguous()
    kd_grad_N = (factors.kd * (logit_scale / T)).contiguous()
    signal_N = factors.signal.to(torch.uint8).contiguous()
    ce_N, kd_N, student_lse_N, teacher_lse_N = (torch.zeros(N) for _ in range(4))
    ratio_N, floored_N = torch.ones(N), torch.zeros(N, dtype=torch.int32)
    dH_ND = _gradient(hidden.shape, hidden.dtype) if needs_hidden else hidden.new_empty(0)
    dW_VD = _gradient(weight.shape, weight.dtype) if needs_weight else weight.new_empty(0)
    db_V = torch.zeros(weight.shape[0]) if needs_bias else torch.empty(0)
    if needs_weight:
        dW_VD[V:] = 0
    distill(
        {
            "N": N,
            "V": V,
            "K": id_NK.shape[1] if kind == "topk" and id_NK is not None else 1,
            "student": head_tuple(hidden, weight, bias_V, logit_scale, logit_softcap),
            "signal": _SIGNALS.index(kind),
            "teacher_logits": matrix_of(teacher_logits),
            "teacher": head_tuple(teacher_hidden, teacher_weight, teacher_bias_V, teacher_scale, teacher_softcap),
            "ids": address_of(id_NK),
            "logprobs": address_of(logprob_NK),
            "extra": address_of(extra_N),
            "labels": address_of(label_N),
            "has_signal": address_of(signal_N),
            "ce_grad": address_of(ce_grad_N),
            "kd_grad": address_of(kd_grad_N),
            "temperature": T,
            "divergence": DIVERGENCES.index(divergence),
            "beta": beta,
            "skew": skew,
            "stash_bytes": stash_bytes or int(stash_megabytes() * 2**20),
            "threads": torch.get_num_threads(),
            "level": LEVELS.index(cpu_level()),
            "ce": address_of(ce_N),
            "kd": address_of(kd_N),
            "ratio": address_of(ratio_N),
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
    op_checks.check_student_rows(student_lse_N, 0)
    if kind == "full":
        op_checks.check_teacher_rows(torch.where(factors.signal, teacher_lse_N, 0.0), 0)
    loss = (factors.ce * ce_N).sum() + (factors.kd * kd_N).sum()
    metrics = factors.metrics(kind, floored_N, extra_N, ratio_N, RATIO_CAP)
    return loss, ce_N, factors.t2 * kd_N, metrics, dH_ND, dW_VD, pad_vocabulary(db_V, weight.shape[0])


def _gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _gradient(shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory comes back into use when the tensor is gone: pages that are new cost as much as a product."""
    from bbopd._C import Buffer

    dtype, count = _gradient_dtype(dtype), shape.numel()
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(Buffer(count * dtype.itemsize), dtype=dtype, count=count).view(shape)


@_linear_distill.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    needs_hidden, needs_weight, needs_bias = rest[-4:-1]
    N = hidden.shape[0]
    empty = hidden.new_empty
    return (
        empty((), dtype=torch.float32),
        empty(N, dtype=torch.float32),
        empty(N, dtype=torch.float32),
        empty(len(METRICS), dtype=torch.float32),
        empty(hidden.shape, dtype=_gradient_dtype(hidden.dtype)) if needs_hidden else hidden.new_empty(0),
        empty(weight.shape, dtype=_gradient_dtype(weight.dtype)) if needs_weight else weight.new_empty(0),
        empty((weight.shape[0],) if needs_bias else (0,), dtype=torch.float32),
    )


_linear_distill.register_autograd(scale_gradients, setup_context=save_gradients)
