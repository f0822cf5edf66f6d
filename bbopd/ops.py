"""The two public ops: their arguments checked, and the engine chosen.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbopd import cpu_distill, cpu_logprobs, cpu_tensors, op_checks, reference
from bbopd.types import DistillLoss, FullTeacher, OpTeacher, TokenLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

ENGINES = ("reference", "cpu")
"""What ``impl`` may name, beside ``auto``; where they can run also the `GPU_ENGINES`."""

GPU_ENGINES = {"triton": ("bbopd.kernels.distill", "bbopd.kernels.logprobs"), "cuda": ("bbopd.cuda_engine",) * 2}
"""Engines for a GPU, the first found being ``auto``'s, and the modules of `linear_distill` and `linear_logprobs`."""


def linear_distill(
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
    impl: str = "auto",
) -> DistillLoss:
    """The distillation loss of a language model's head, without a ``[N, V]`` tensor ever existing.

    ``loss = ce_weight * mean CE(labels, softmax(z)) + kd_weight * T^2 * mean KD(p^T, q^T)`` with ``z = softcap(logit_scale *
    (hidden @ weight.T + bias))`` and ``q^T = softmax(z / T)``. CE is at temperature 1, its mean over the tokens with a label; KD's is over
    those with a signal. Logits are float32 (float64 where an input is) and are never rounded; autocast does not change that.

    Parameters
    ----------
    hidden : Tensor [N, D]
        Any float dtype, any strides.
    weight : Tensor [V, D]
        As in ``lm_head.weight``. It may have another dtype than ``hidden``; its gradient is accumulated in float32.
    teacher : FullTeacher | TopKTeacher | CandidateTeacher | SampledTeacher | None
        What is known of the teacher's distribution; a constant, without a gradient. None leaves cross-entropy alone.
    labels : Tensor [N] of integers, optional
        ``ignore_index`` where there is no ground truth.
    temperature : float
        T of both distributions in KD. Logprobs of a teacher must have been taken at it.
    ce_weight, kd_weight : float
        Factors of the two terms, 0 or more.
    divergence : str
        ``forward_kl``, ``reverse_kl``, ``jsd`` (with ``beta``; Agarwal et al. 2306.13649, section 2), ``skew_forward_kl``,
        ``skew_reverse_kl`` (with ``skew``; Ko et al. 2402.03898, section 3.1). With a `SampledTeacher` it is always reverse KL, by policy
        gradient.
    t2_scaling : bool
        Multiply KD by T^2 (Hinton et al. 1503.02531, section 2), so that its gradient keeps its size as T changes.
    bias : Tensor [V], optional
    logit_scale, logit_softcap : float
        The head's own; the soft cap is ``c * tanh(z / c)``.
    vocab_size : int, optional
        Only the first ``vocab_size`` logits count, the rest are padding.
    token_weight : Tensor [N], optional
        Factors of each token's terms; the means still divide by the number of tokens.
    normalizer : (ce_tokens, kd_tokens) or one number, optional
        Divides the sums instead of this call's own counts, so that micro-batches and ranks add up to one mean.
    group : ProcessGroup, optional
        Ranks over which the vocabulary is split, in their order: each passes its own rows of ``weight`` and ``bias`` (sizes may differ, and
        be 0) and, of a `FullTeacher`, its own columns of ``logits``, or rows of ``weight`` and ``bias``, cut at the same ids. All else is
        the same on every rank: the tokens, ids and labels of the whole vocabulary, ``vocab_size`` counted over all. So are the results and
        the gradient of ``hidden``, which is complete: do not add it up again. The gradients of weight and bias are the rank's own. What
        one rank refuses raises on every one. The sizes are exchanged in every call, so a GPU is waited for unless the group has a CPU
        backend as well. ``impl`` may be any but ``cpu``, and all ranks have the same; on CPU tensors ``auto`` takes ``reference``. Ranks
        with different tokens (data parallel) are not this: they pass ``group=None``, and as ``normalizer`` the counts of all ranks
        together, so that their gradients add up to the mean.
    check : bool, optional
        Check values on a GPU as well, which waits for it. On a CPU they always are.
    impl : str
        ``reference`` (plain PyTorch, any device and float dtype), ``cpu`` (C++; float32, bfloat16 and float16 on a CPU), ``triton`` and
        ``cuda`` (the same dtypes on a GPU, where Triton is installed, or bbopd was built with nvcc). ``auto`` takes the first that fits of
        ``cpu``, ``triton``, ``cuda``, ``reference``. The GPU engines have been proven in Triton's interpreter, in an emulation on the
        host, and by compiling them; no GPU has run or timed them yet.

    Returns
    -------
    DistillLoss
        ``loss``, scalar, differentiable once by hidden, weight and bias; a term without any valid token is 0. ``ce`` and ``kd`` [N], nats,
        0 where a token has none. ``metrics``: ``ce_tokens``, ``kd_tokens``; ``floored`` (logprobs read as -30 in reverse KL),
        ``teacher_tail_mass`` (mean), ``importance_ratio`` (mean) and ``ratio_capped`` (count) where they apply.

    Raises
    ------
    ValueError
        Shapes, dtypes, devices, temperatures, names or values that do not fit, here or on another rank of ``group``.
    RuntimeError
        A second derivative was asked for, in backward.
    """
    if group is not None:
        op_checks.check_process_group(group)
    try:
        engine = _gpu_engine(impl, 0)
        op_checks.check_engine(impl, ENGINES if engine is None else (*ENGINES, impl))
        op_checks.check_head(hidden, weight, bias, logit_scale, logit_softcap)
        op_checks.check_temperature(temperature)
        op_checks.check_numbers(ce_weight, kd_weight, divergence, beta, skew)
        if labels is not None:
            op_checks.check_ids("labels", labels, hidden, 1)
        if token_weight is not None:
            op_checks.check_token_weight(token_weight, hidden)
        if teacher is not None:
            op_checks.check_teacher(teacher, hidden, temperature)
        elif labels is None:
            raise ValueError("neither a teacher nor labels were given: there is nothing to learn from")
        if group is None:
            op_checks.check_vocab_size(vocab_size, weight.shape[0])
            op_checks.check_teacher_vocabulary(teacher, weight.shape[0], vocab_size)
        else:
            op_checks.check_group(impl, vocab_size)
    except (TypeError, ValueError) as error:
        if group is not None:
            reference.refuse(group, error)  # the other ranks would wait for this one
        raise
    of_teacher = (teacher.logits, teacher.hidden, teacher.weight, teacher.bias) if isinstance(teacher, FullTeacher) else ()
    if engine is None:
        on_cpu = cpu_distill if group is None else reference
        engine = _choose(impl, 0, on_cpu, hidden, weight, bias, *of_teacher)
    return engine.linear_distill(
        hidden,
        weight,
        teacher,
        labels,
        temperature=temperature,
        ce_weight=ce_weight,
        kd_weight=kd_weight,
        divergence=divergence,
        beta=beta,
        skew=skew,
        t2_scaling=t2_scaling,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
        token_weight=token_weight,
        ignore_index=ignore_index,
        normalizer=normalizer,
        group=group,
        check=check,
    )


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    *,
    token_ids: Tensor | None = None,
    top_k: int = 0,
    candidate_ids: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    impl: str = "auto",
) -> TokenLogprobs:
    """Log-probabilities of a language model's head, without a ``[N, V]`` tensor ever existing. Not differentiable.

    Parameters
    ----------
    hidden : Tensor [N, D]
    weight : Tensor [V, D]
    token_ids : Tensor [N] of integers, optional
        Asks for ``sampled``, the log-probability of each token's own id.
    top_k : int
        Asks for the ``top_k`` most probable ids, best first (the lower id first where two are equal), their log-probabilities, and
        ``log_tail``, the logarithm of all the other mass.
    candidate_ids : Tensor [N, M] of integers, optional
        Asks for the log-probabilities at these ids (-1 is an empty slot, which gets -inf) and the mass outside them.
    temperature : float
        Divides the logits; it applies to everything returned.
    bias, logit_scale, logit_softcap, vocab_size
        As in `linear_distill`.
    impl : str
        ``reference``, ``cpu``, ``triton``, ``cuda`` or ``auto``, as in `linear_distill`.

    Returns
    -------
    TokenLogprobs
        float32 (float64 where an input is), nats. Tails are summed over the other logits, not taken as 1 minus the rest, so that one of
        1e-30 is as exact as one of 0.5.

    Raises
    ------
    ValueError
        Shapes, dtypes, devices, names or values that do not fit.
    """
    engine = _gpu_engine(impl, 1)
    op_checks.check_engine(impl, ENGINES if engine is None else (*ENGINES, impl))
    op_checks.check_head(hidden, weight, bias, logit_scale, logit_softcap)
    available = op_checks.check_vocab_size(vocab_size, weight.shape[0])
    op_checks.check_temperature(temperature)
    if token_ids is not None:
        op_checks.check_ids("token_ids", token_ids, hidden, 1)
    if candidate_ids is not None:
        op_checks.check_ids("candidate_ids", candidate_ids, hidden, 2)
        if candidate_ids.shape[1] == 0:
            raise ValueError(f"candidate_ids has shape {tuple(candidate_ids.shape)}: at least one id a token is needed")
    if not 0 <= top_k <= available:
        raise ValueError(f"top_k is {top_k}: it must be from 0 to the vocabulary's {available}")
    engine = engine or _choose(impl, 1, cpu_logprobs, hidden, weight, bias)
    return engine.linear_logprobs(
        hidden,
        weight,
        token_ids=token_ids,
        top_k=top_k,
        candidate_ids=candidate_ids,
        temperature=temperature,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        vocab_size=vocab_size,
    )


def _choose(impl: str, op: int, cpu: Any, *tensors: Tensor | None) -> Any:
    """The engine of an op on ``tensors``, where ``impl`` does not settle it: C++ or a GPU's wherever that fits, else the reference."""
    fits = cpu_tensors.takes(*tensors)
    if impl == "cpu" and not fits:
        kinds = ", ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors if tensor is not None}))
        raise ValueError(f"impl='cpu' takes float32, bfloat16 and float16 tensors on a CPU, not {kinds}: use impl='reference'")
    if impl == "reference":
        return reference
    if fits:
        return cpu
    if all(tensor is None or (tensor.is_cuda and tensor.dtype in cpu_tensors.TYPES) for tensor in tensors):
        return next(filter(None, (_gpu_engine(name, op) for name in GPU_ENGINES)), reference)
    return reference


def _gpu_engine(impl: str, op: int) -> Any:
    """The module of a GPU engine that computes an op (0 or 1, as in `GPU_ENGINES`), where there is one and it can run; looked for only
    when asked for, as importing Triton takes seconds."""
    if impl not in GPU_ENGINES:
        return None
    try:
        engine = importlib.import_module(GPU_ENGINES[impl][op])
    except ModuleNotFoundError:
        return None
    return engine if engine.INTERPRETED or torch.cuda.is_available() else None
