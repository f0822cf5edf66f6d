"""The two ops in plain PyTorch: the truth that every faster engine is held to.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support. Logits exist for one chunk of tokens at a time, in
float32 (float64 where hidden or weight is); the gradient is made in
the same pass, so that a training step costs three matrix products, and backward only scales. Both ops are registered with PyTorch, so
that ``torch.compile`` sees one opaque node of each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.reference_distill import METRICS, Distillation, head_of, run
from bbopd.reference_logprobs import linear_logprobs
from bbopd.reference_math import RATIO_CAP, compute_dtype, without_autocast
from bbopd.reference_tokens import TokenWeights, check_values
from bbopd.reference_vocabulary import WHOLE, Shard, Whole, describe, refuse
from bbopd.types import CandidateTeacher, DistillLoss, FullTeacher, OpTeacher, SampledTeacher, TopKTeacher

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["linear_distill", "linear_logprobs", "refuse"]


def linear_distill(
    hidden: Tensor, weight: Tensor, teacher: OpTeacher | None, labels: Tensor | None = None, *, chunk_tokens: int = 0, **options: Any
) -> DistillLoss:
    """`bbopd.ops.linear_distill`, on arguments of the right shapes and dtypes; ``chunk_tokens`` 0 chooses by the memory of a chunk."""
    return linear_distill_with(_linear_distill, chunk_tokens, hidden, weight, teacher, labels, **options)


def linear_distill_with(
    op: Any,
    memory: int,
    hidden: Tensor,
    weight: Tensor,
    teacher: OpTeacher | None,
    labels: Tensor | None = None,
    *,
    temperature: float = 1.0,
    ce_weight: float = 0.5,
    kd_weight: float = 0.5,
    divergence: str = "forward_kl",
    beta: float = 0.5,
    skew: float = 0.1,
    t2_scaling: bool = True,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    token_weight: Tensor | None = None,
    ignore_index: int = -100,
    normalizer: tuple[float | Tensor, float | Tensor] | float | Tensor | None = None,
    group: ProcessGroup | None = None,
    check: bool | None = None,
) -> DistillLoss:
    """Call a registered op of an engine; ``memory`` is its last argument, 0 for what the engine finds good."""
    if divergence == "jsd" and beta in (0.0, 1.0):
        divergence = "forward_kl" if beta == 0.0 else "reverse_kl"
    kind, tensors = _flatten_teacher(teacher)
    full = teacher if isinstance(teacher, FullTeacher) else FullTeacher()
    if normalizer is not None:
        normalizer = _pair(normalizer if isinstance(normalizer, tuple) else (normalizer, normalizer), hidden.device)
    grad = torch.is_grad_enabled()
    loss, ce, kd, metrics, *_ = op(
        hidden,
        weight,
        bias,
        labels,
        token_weight,
        normalizer,
        *tensors,
        _pair((ce_weight, kd_weight), hidden.device),
        kind,
        divergence,
        temperature,
        beta,
        skew,
        t2_scaling,
        logit_scale,
        logit_softcap,
        full.logit_scale,
        full.logit_softcap,
        vocab_size or (weight.shape[0] if group is None else 0),
        ignore_index,
        bool(check) or hidden.device.type == "cpu",
        grad and hidden.requires_grad,
        grad and weight.requires_grad,
        grad and bias is not None and bias.requires_grad,
        None if group is None else group.group_name,
        memory,
    )
    named = dict(zip(METRICS, metrics.detach().unbind(), strict=True))
    for name, kinds in (
        ("floored", "full topk"),
        ("teacher_tail_mass", "topk"),
        ("importance_ratio", "sampled"),
        ("ratio_capped", "sampled"),
    ):
        if kind not in kinds.split():
            del named[name]
    return DistillLoss(loss=loss, ce=ce.detach(), kd=kd.detach(), metrics=named)


def _pair(numbers: tuple[float | Tensor, float | Tensor], device: torch.device) -> Tensor:
    """Two numbers that may change at every step, as a tensor, by a product: the one way in which a float does not become part of
    ``torch.compile``'s graph, to be built anew for every value."""
    one = torch.ones((), dtype=torch.float64, device=device)
    return torch.stack([one * number for number in numbers])


def _flatten_teacher(teacher: OpTeacher | None) -> tuple[str, tuple[Tensor | None, ...]]:
    """The kind of a teacher, and its tensors: valid, logits, hidden, weight, bias, ids, logprobs, log_tail or behavior_logprobs."""
    tensors: tuple[Tensor | None, ...]
    if isinstance(teacher, FullTeacher):
        tensors = (teacher.valid, teacher.logits, teacher.hidden, teacher.weight, teacher.bias, None, None, None)
        kind = "full"
    elif isinstance(teacher, (TopKTeacher, CandidateTeacher)):
        tensors = (teacher.valid, None, None, None, None, teacher.ids, teacher.logprobs, teacher.log_tail)
        kind = "topk"
    elif isinstance(teacher, SampledTeacher):
        logprobs = teacher.logprobs
        if teacher.advantages is not None:  # the engines know one form: log p - log q_old
            logprobs = teacher.behavior_logprobs.double() + teacher.advantages
        tensors = (teacher.valid, None, None, None, None, teacher.token_ids, logprobs, teacher.behavior_logprobs)
        kind = "sampled"
    else:
        return "none", (None,) * 8
    return kind, tuple(None if tensor is None else tensor.detach() for tensor in tensors)


def pad_vocabulary(grad: Tensor, rows: int) -> Tensor:
    """A gradient with zeros for the logits that are padding."""
    missing = rows - grad.shape[0]
    return torch.nn.functional.pad(grad, (0, 0) * (grad.dim() - 1) + (0, missing)) if missing else grad


def save_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output[4:])
    ctx.count = len(inputs)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs[:3]]


def scale_gradients(ctx: Any, grad_loss: Tensor | None, *grad_others: Tensor | None) -> tuple[Tensor | None, ...]:
    if any(grad is not None for grad in grad_others):
        raise RuntimeError("linear_distill has no second derivative: its gradient is computed with the loss; drop create_graph=True")
    # the saved tensors are nobody else's once the graph is let go
    in_place = not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()
    grads = [
        _scaled(saved, grad_loss, in_place).to(dtype) if grad_loss is not None and needed and dtype is not None else None
        for saved, needed, dtype in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], ctx.dtypes, strict=True)
    ]
    return (*grads, *([None] * (ctx.count - 3)))


def _scaled(saved: Tensor, factor: Tensor, in_place: bool) -> Tensor:
    if not in_place:
        return factor * saved
    is_one = not factor.is_cuda and bool(factor == 1.0)  # asking a GPU would wait for it
    return saved if is_one else saved.mul_(factor)


Run = Callable[[Distillation, bool, bool, bool, int], tuple[Tensor, Tensor, Tensor]]
"""Fills in the losses of a `Distillation`; from the gradients needed of hidden, weight and bias, and the op's last argument, those
gradients over the vocabulary in use, or all of it (empty where not needed)."""


def register(name: str, run: Run, gradient_dtype: Callable[[torch.dtype, torch.dtype], torch.dtype]) -> Any:
    """Register ``run`` as an op, one opaque node to ``torch.compile``; ``gradient_dtype`` of an input's dtype and the compute dtype."""

    @torch.library.custom_op(name, mutates_args=())
    def linear_distill_op(
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
        group: str | None,
        memory: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        dtype = compute_dtype(hidden, weight)
        N, device, V, total = hidden.shape[0], hidden.device, vocab_size, vocab_size
        vocabulary: Whole = WHOLE
        shared: dict[str, Tensor | None] = {}
        if group is not None:
            shared = {
                "hidden": hidden,
                "labels": labels,
                "token_weight": token_weight,
                "normalizer": normalizer,
                "(ce_weight, kd_weight)": weights,
                "teacher.valid": valid,
                "teacher.hidden": teacher_hidden,
                "teacher.ids": ids,
                "teacher.logprobs": logprobs,
                "teacher.log_tail or behavior_logprobs": extra,
            }
            own = {
                "weight": weight,
                "bias": bias,
                "teacher.logits": teacher_logits,
                "teacher.weight": teacher_weight,
                "teacher.bias": teacher_bias,
            }
            options = {
                "the kind of teacher": kind,
                "divergence": divergence,
                "temperature": temperature,
                "beta": beta,
                "skew": skew,
                "t2_scaling": t2_scaling,
                "logit_scale": logit_scale,
                "logit_softcap": logit_softcap,
                "teacher.logit_scale": teacher_scale,
                "teacher.logit_softcap": teacher_softcap,
                "ignore_index": ignore_index,
                "check": check,
                "hidden.requires_grad": needs_hidden,
                "chunk_tokens": memory,
                "the engine": name,
            }
            rows = weight.shape[0], op_checks.vocabulary_of(teacher_logits, teacher_weight)
            shard = Shard.agree(group, *rows, vocab_size, options | describe(shared, own))
            vocabulary, V, total = shard, shard.columns, shard.total
        with without_autocast(device):
            if check:
                vocabulary.check(
                    lambda: check_values(labels, token_weight, normalizer, valid, ids, logprobs, extra, kind, total, ignore_index), shared
                )
            factors = TokenWeights.of(
                hidden, labels, token_weight, normalizer, valid, weights, kind, temperature, t2_scaling, ignore_index, dtype
            )
            has_label_N, signal_N, t2 = factors.has_label, factors.signal, factors.t2

            teacher: Any = None
            if kind == "full":
                teacher = teacher_logits
                if teacher_hidden is not None and teacher_weight is not None:
                    teacher = head_of(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap, V)
            ids_NK = logprobs_NK = extra_N = None
            if ids is not None and logprobs is not None and extra is not None:
                ids_NK, logprobs_NK, extra_N = ids.long(), logprobs.to(dtype), extra.to(dtype)
                if kind == "sampled":
                    ids_NK, logprobs_NK = torch.where(signal_N, ids_NK, 0)[:, None], logprobs_NK[:, None]
            case = Distillation(
                student=head_of(hidden, weight, bias, logit_scale, logit_softcap, V),
                rows=weight.shape[0],
                vocabulary=vocabulary,
                teacher=teacher,
                ids=ids_NK,
                logprobs=logprobs_NK,
                extra=extra_N,
                is_sampled=kind == "sampled",
                labels=labels,
                has_label=has_label_N,
                signal=signal_N,
                mask_rows=valid is not None,
                temperature=temperature if kind != "none" else 1.0,
                divergence=divergence,  # type: ignore[arg-type]
                beta=beta,
                skew=skew,
                check=check,
                ce_grad=(factors.ce * logit_scale)[:, None],
                kd_grad=(factors.kd * (logit_scale / temperature))[:, None],
                ce=torch.zeros(N, dtype=dtype, device=device),
                kd=torch.zeros(N, dtype=dtype, device=device),
                floored=torch.zeros(N, dtype=torch.int64, device=device),
                ratio=torch.ones(N, dtype=dtype, device=device),
            )
            dH_ND, dW_VD, db_V = run(case, needs_hidden, needs_weight, needs_bias, memory)
            loss = (factors.ce * case.ce).sum() + (factors.kd * case.kd).sum()
            metrics = factors.metrics(kind, case.floored, extra_N, case.ratio, RATIO_CAP)
        dW_VD = pad_vocabulary(dW_VD, weight.shape[0]) if needs_weight else dW_VD
        db_V = pad_vocabulary(db_V, weight.shape[0]) if needs_bias else db_V
        return loss, case.ce, t2 * case.kd, metrics, dH_ND, dW_VD, db_V

    @linear_distill_op.register_fake
    def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
        dtype = compute_dtype(hidden, weight)
        needs_hidden, needs_weight, needs_bias = rest[-5:-2]
        empty = hidden.new_empty
        return (
            empty((), dtype=dtype),
            empty(hidden.shape[0], dtype=dtype),
            empty(hidden.shape[0], dtype=dtype),
            empty(len(METRICS), dtype=dtype),
            empty(hidden.shape if needs_hidden else (0,), dtype=gradient_dtype(hidden.dtype, dtype)),
            empty(weight.shape if needs_weight else (0,), dtype=gradient_dtype(weight.dtype, dtype)),
            empty((weight.shape[0],) if needs_bias else (0,), dtype=dtype),
        )

    linear_distill_op.register_autograd(scale_gradients, setup_context=save_gradients)
    return linear_distill_op


_linear_distill = register("bbopd::linear_distill_reference", run, lambda _, computed: computed)
