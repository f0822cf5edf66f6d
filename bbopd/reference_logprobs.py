"""`linear_logprobs` in plain PyTorch, chunk by chunk.

Shape suffixes: ``N`` tokens, ``n`` tokens of a block, ``D`` hidden, ``V`` vocabulary in use, ``K`` ids of a support, ``M`` candidates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.reference_distill import Head, chunk_rows, head_of
from bbopd.reference_math import (
    Support,
    compute_dtype,
    softmax_in_place,
    stable_top_k,
    support_log_probs,
    take_support,
    without_autocast,
)
from bbopd.types import TokenLogprobs


def linear_logprobs(*arguments: Any, **options: Any) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs`, on arguments of the right shapes and dtypes."""
    return linear_logprobs_with(_linear_logprobs, *arguments, **options)


def linear_logprobs_with(
    op: Callable[..., tuple[Tensor, ...]],
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
    chunk_tokens: int = 0,
) -> TokenLogprobs:
    """Call an engine's ``op``, and name what it returns."""
    found = op(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        token_ids,
        candidate_ids,
        top_k,
        temperature,
        logit_scale,
        logit_softcap,
        vocab_size or weight.shape[0],
        hidden.device.type == "cpu",
        chunk_tokens,
    )
    logsumexp, sampled, topk_ids, topk_logprobs, log_tail, candidates, candidates_log_tail = found
    return TokenLogprobs(
        logsumexp=logsumexp,
        sampled=None if token_ids is None else sampled,
        topk_ids=topk_ids if top_k else None,
        topk_logprobs=topk_logprobs if top_k else None,
        log_tail=log_tail if top_k else None,
        candidates=None if candidate_ids is None else candidates,
        candidates_log_tail=None if candidate_ids is None else candidates_log_tail,
    )


@dataclass(frozen=True, slots=True)
class Scoring:
    """One call of `linear_logprobs`: its inputs, and the results that an engine fills in; one not asked for has no elements."""

    head: Head
    token_ids: Tensor | None  # [N]
    candidate_ids: Tensor | None  # [N, M]
    top_k: int
    temperature: float
    check: bool  # also what depends on values
    chunk_tokens: int  # 0 for what the engine finds good
    logsumexp: Tensor  # [N]
    sampled: Tensor  # [N]
    topk_ids: Tensor  # [N, K] int64
    topk_logprobs: Tensor  # [N, K]
    log_tail: Tensor  # [N]
    candidates: Tensor  # [N, M]
    candidates_log_tail: Tensor  # [N]


def register(name: str, run: Callable[[Scoring], None]) -> Any:
    """Register an engine's ``run`` as an op, one opaque node to ``torch.compile``."""

    @torch.library.custom_op(name, mutates_args=())
    def linear_logprobs_op(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        token_ids: Tensor | None,
        candidate_ids: Tensor | None,
        top_k: int,
        temperature: float,
        logit_scale: float,
        logit_softcap: float | None,
        vocab_size: int,
        check: bool,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        if check:
            op_checks.check_scored_ids(token_ids, candidate_ids, vocab_size)
        results = _empty_results(hidden, weight, token_ids, candidate_ids, top_k)
        head = head_of(hidden, weight, bias, logit_scale, logit_softcap, vocab_size)
        with without_autocast(hidden.device):
            run(Scoring(head, token_ids, candidate_ids, top_k, temperature, check, chunk_tokens, *results))
        return results

    @linear_logprobs_op.register_fake
    def _(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor | None, candidate_ids: Tensor | None, top_k: int, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return _empty_results(hidden, weight, token_ids, candidate_ids, top_k)

    return linear_logprobs_op


def _empty_results(
    hidden: Tensor, weight: Tensor, token_ids: Tensor | None, candidate_ids: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The last seven fields of `Scoring`."""
    N, M = hidden.shape[0], 0 if candidate_ids is None else candidate_ids.shape[1]

    def empty(*shape: int) -> Tensor:
        return hidden.new_empty(shape, dtype=compute_dtype(hidden, weight))

    ids_NK, topk_NK, log_tail_N = hidden.new_empty((N, top_k), dtype=torch.int64), empty(N, top_k), empty(N if top_k else 0)
    return empty(N), empty(0 if token_ids is None else N), ids_NK, topk_NK, log_tail_N, empty(N, M), empty(N if M else 0)


def run(case: Scoring) -> None:
    """Fill in the results of ``case``."""
    dtype, device, N, V = case.logsumexp.dtype, case.logsumexp.device, case.head.hidden.shape[0], case.head.weight.shape[0]
    head = case.head.to(dtype)
    chunk, block = chunk_rows(V, device)
    chunk = min(case.chunk_tokens or chunk, max(N, 1))
    buffer_nV = torch.empty(chunk, V, dtype=dtype, device=device)
    for start in range(0, N, chunk):
        rows = slice(start, min(start + chunk, N))
        head.write_logits(rows, buffer_nV[: rows.stop - start])
        for first in range(start, rows.stop, block):
            part = slice(first, min(first + block, rows.stop))
            _fill(case, buffer_nV[part.start - start : part.stop - start], part)


def _fill(case: Scoring, z_nV: Tensor, rows: slice) -> None:
    """Fill in the results of ``rows`` from their logits, which are overwritten."""
    token_z_n1 = None if case.token_ids is None else z_nV.gather(1, case.token_ids[rows, None].long())
    lse_n1: Tensor | None = None
    if case.top_k:
        case.topk_ids[rows] = ids_nK = stable_top_k(z_nV, case.top_k)
        case.topk_logprobs[rows], case.log_tail[rows], lse_n1 = _around(z_nV, ids_nK, case.temperature)
    if case.candidate_ids is not None:
        found_nM = _around(z_nV, case.candidate_ids[rows].long(), case.temperature)
        case.candidates[rows], case.candidates_log_tail[rows], lse_n1 = found_nM
    if lse_n1 is None:
        lse_n1 = softmax_in_place(z_nV.mul_(1.0 / case.temperature), torch.empty_like(z_nV))[1]
    if case.check:
        op_checks.check_student_rows(lse_n1[:, 0], rows.start)
    case.logsumexp[rows] = lse_n1[:, 0]
    if token_z_n1 is not None:
        case.sampled[rows] = (token_z_n1 / case.temperature - lse_n1)[:, 0]


def _around(z_nV: Tensor, ids_nK: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    support = take_support(z_nV, ids_nK)
    off_nV = torch.sub(z_nV, support.off_max).mul_(1.0 / temperature).exp_()
    return log_probs_around(z_nV, ids_nK, support, off_nV.sum(1, keepdim=True), temperature)


def log_probs_around(
    z_nV: Tensor, ids_nK: Tensor, support: Support, off_sum_n1: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities at ``ids_nK`` (-inf in empty slots) and of all the rest [n], and the logsumexp [n, 1].

    ``off_sum_n1`` is the sum of ``exp((z - off_max) / T)`` outside the support, whose logits return into ``z_nV``.
    """
    log_probs_nC, lse_n1 = support_log_probs(support, off_sum_n1, temperature)
    support.scatter(z_nV, support.values)
    empty_nK = ids_nK < 0
    # a token without any id stands on id 0: the rest is all there is
    log_tail_n = log_probs_nC[:, -1].masked_fill(empty_nK.all(1), 0.0)
    return log_probs_nC[:, :-1].masked_fill(empty_nK, -torch.inf), log_tail_n, lse_n1


_linear_logprobs = register("bbopd::linear_logprobs_reference", run)
