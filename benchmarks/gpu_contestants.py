"""Who takes part on a GPU: the floor of matrix products, our engines, PyTorch, and the other libraries' fused losses.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bbopd import linear_distill, linear_logprobs
from benchmarks import distill, logprobs
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Step
from benchmarks.inputs import Inputs

IMPLS = ("triton", "cuda")
FLOOR_TOKENS = 8192  # enough to multiply at full speed; more would only take memory from the contestants
HEAD_NOTE = distill.HEAD_TEACHER + "; CE and KD"

# ---------------------------------------------------------------- floors


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """``a @ b`` into ``out``, which may be float32 where they are not."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)


def distill_floor(inputs: Inputs) -> Step:
    """Logits in float32, dH, and dW in float32 where the head is trained, into memory that is there already; no loss at all.

    With a teacher's hidden states and head, its logits too. dW of a chunk is written, not added.
    """
    hidden, weight, teacher_weight = inputs.hidden.detach(), inputs.weight.detach(), inputs.teacher_weight
    n = min(hidden.shape[0], FLOOR_TOKENS)
    logits_nV = torch.empty(n, weight.shape[0], dtype=torch.float32, device=hidden.device)
    multiply(hidden[:n], weight.T, logits_nV)
    dz_nV = logits_nV.to(hidden.dtype)  # a GPU multiplies zeros faster than numbers
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.empty_like(weight, dtype=torch.float32) if inputs.weight.requires_grad else None

    def step() -> None:
        for start in range(0, hidden.shape[0], n):
            rows = hidden[start : start + n]
            multiply(rows, weight.T, logits_nV[: len(rows)])
            if inputs.case.teacher == "full_hidden":
                assert teacher_weight is not None
                multiply(rows, teacher_weight.T, logits_nV[: len(rows)])
            multiply(dz_nV[: len(rows)], weight, grad_hidden[start : start + n])
            if grad_weight is not None:
                multiply(dz_nV[: len(rows)].T, rows, grad_weight)

    return step


def logprobs_floor(inputs: Inputs) -> Step:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    n = min(hidden.shape[0], FLOOR_TOKENS)
    logits_nV = torch.empty(n, weight.shape[0], dtype=torch.float32, device=hidden.device)

    def step() -> None:
        for rows in hidden.split(n):
            multiply(rows, weight.T, logits_nV[: len(rows)])

    return step


# ---------------------------------------------------------------- ours


def engine_missing(impl: str, case: Case) -> str:
    """Why an engine is not in this build or cannot run on the device, or an empty string."""
    hidden, weight = (torch.zeros(rows, 1, device=case.device, dtype=getattr(torch, case.dtype)) for rows in (1, 2))
    try:
        linear_distill(hidden, weight, None, torch.zeros(1, dtype=torch.long, device=case.device), impl=impl)
        linear_logprobs(hidden, weight, impl=impl)
    except ValueError as error:
        return str(error)
    return ""


# ---------------------------------------------------------------- other libraries


def liger_cross_entropy(inputs: Inputs) -> Step:
    module: Any = importlib.import_module("liger_kernel.transformers")
    loss = module.LigerFusedLinearCrossEntropyLoss()
    return distill.backward_of(lambda: loss(inputs.weight, inputs.hidden, inputs.labels))


def apple_cross_entropy(inputs: Inputs) -> Step:
    module: Any = importlib.import_module("cut_cross_entropy")
    return distill.backward_of(lambda: module.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.labels))


DISTILL_FLOOR = Contestant("floor: torch.mm(out=)", distill_floor, has_loss=False, note="no loss: the matrix products alone")
_OURS = tuple(Contestant(f"bbopd {impl}", partial(distill.ours, impl=impl), partial(engine_missing, impl)) for impl in IMPLS)
_PYTORCH = (
    Contestant("PyTorch eager", distill.eager, bytes_per_logit=32, is_peer=True),
    Contestant("torch.compile", distill.compiled, bytes_per_logit=20, is_compiled=True, is_peer=True),
)
_CROSS_ENTROPY = (
    Contestant("F.linear_cross_entropy", distill.torch_linear_cross_entropy, distill.torch_too_old, is_peer=True),
    Contestant(
        "Liger fused linear cross-entropy",
        liger_cross_entropy,
        partial(distill.not_installed, "liger_kernel", "liger-kernel"),
        is_peer=True,
    ),
    Contestant(
        "Apple cut cross-entropy",
        apple_cross_entropy,
        partial(distill.not_installed, "cut_cross_entropy", "cut-cross-entropy"),
        is_peer=True,
    ),
)
_HEADS = (
    Contestant(
        "Liger chunked JSD",
        distill.liger,
        partial(distill.not_installed, "liger_kernel", "liger-kernel"),
        is_compiled=True,
        is_peer=True,
        takes_head=True,
        note=HEAD_NOTE,
    ),
)


def distill_contestants(case: Case, compiles: bool) -> tuple[Contestant, ...]:
    """Who takes part in a case; those that are compiled for each shape only where ``compiles``."""
    further = _CROSS_ENTROPY if case.teacher == "none" else _HEADS if case.teacher != "sampled" else ()
    return tuple(one for one in (DISTILL_FLOOR, *_OURS, *_PYTORCH, *further) if compiles or not one.is_compiled)


LOGPROBS_FLOOR = Contestant("floor: one torch.mm(out=)", logprobs_floor, has_loss=False, note="logits alone")
_OUR_SCORES = tuple(
    Contestant(f"bbopd {impl}", partial(logprobs.scores_of, partial(logprobs.our_scores, impl=impl)), partial(engine_missing, impl))
    for impl in IMPLS
)


def logprobs_contestants(case: Case, compiles: bool) -> tuple[Contestant, ...]:
    return tuple(one for one in (LOGPROBS_FLOOR, *_OUR_SCORES, *logprobs.PYTORCH) if compiles or not one.is_compiled)
