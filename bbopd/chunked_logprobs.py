"""`linear_logprobs` on a GPU: a chunk's logits by matrix product, then an engine's kernel that reads each row once.

Asked for top-k or candidates, a row is read more often: for the largest of it, and for the sum of what no list holds.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` top-k,
``M`` candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.chunked_logits import CHUNK_LOGITS, Logits, RowKernels
from bbopd.reference_distill import head_of
from bbopd.reference_logprobs import empty_results, log_probs_around
from bbopd.reference_math import Support, take_ids, without_autocast


def register(name: str, kernels: RowKernels) -> Any:
    """Register an engine's `linear_logprobs` as an op, one opaque node to ``torch.compile``."""

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
        N, V, device = hidden.shape[0], vocab_size, hidden.device
        if check:
            op_checks.check_scored_ids(token_ids, candidate_ids, V)
        found = logsumexp_N, sampled_N, topk_ids_NK, topk_NK, log_tail_N, candidates_NM, candidates_tail_N = empty_results(
            hidden, token_ids, candidate_ids, top_k, torch.float32
        )
        token_ids = None if token_ids is None else token_ids.contiguous()
        selection = kernels.selection_bytes(V, top_k) if top_k else 0
        chunk = min(chunk_tokens or max(1, 4 * CHUNK_LOGITS // (4 * V + selection)), max(N, 1))
        with without_autocast(device), torch.accelerator.device_index(device.index):
            logits = Logits(kernels, head_of(hidden, weight, bias, logit_scale, logit_softcap, V), chunk)
            for start in range(0, N, chunk):
                rows = slice(start, min(start + chunk, N))
                tokens_n = None if token_ids is None else token_ids[rows]
                if not top_k and candidate_ids is None:
                    kernels.logprobs(logits, rows, temperature, tokens_n, logsumexp_N[rows], sampled_N[rows])
                else:
                    z_nS = logits.write(rows)
                    z_n1 = None if tokens_n is None else _at(z_nS, V, tokens_n[:, None])
                    if top_k:
                        topk_ids_NK[rows] = ids_nK = kernels.top_k(z_nS, V, top_k)
                        topk_NK[rows], log_tail_N[rows], lse_n1 = _around(kernels, z_nS, V, ids_nK, temperature)
                    if candidate_ids is not None:
                        ids_nM = candidate_ids[rows].long()
                        beyond_nM = ids_nM >= V
                        found_nM = _around(kernels, z_nS, V, ids_nM.masked_fill(beyond_nM, -1), temperature)
                        log_probs_nM, candidates_tail_N[rows], lse_n1 = found_nM
                        candidates_NM[rows] = log_probs_nM.masked_fill(beyond_nM, torch.nan)
                    logsumexp_N[rows] = lse_n1[:, 0]
                    if z_n1 is not None:
                        sampled_N[rows] = (z_n1 / temperature - lse_n1)[:, 0]
                if check:
                    op_checks.check_student_rows(logsumexp_N[rows], start)
        return found

    @linear_logprobs_op.register_fake
    def _(
        hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor | None, candidate_ids: Tensor | None, top_k: int, *rest: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        return empty_results(hidden, token_ids, candidate_ids, top_k, torch.float32)

    return linear_logprobs_op


def _at(z_nS: Tensor, V: int, ids_n1: Tensor) -> Tensor:
    """The logits of ids, NaN where one is outside the vocabulary."""
    inside_n1 = (ids_n1 >= 0) & (ids_n1 < V)
    return z_nS.gather(1, torch.where(inside_n1, ids_n1, 0).long()).masked_fill(~inside_n1, torch.nan)


def _around(kernels: RowKernels, z_nS: Tensor, V: int, ids_nK: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`log_probs_around` the ids, which leave the row, so that the tail is a sum of what is left, and return to it."""
    z_nV = z_nS[:, :V]
    taken = take_ids(z_nV, ids_nK)
    off_max_n1, sum_n1, _ = kernels.statistics(z_nS, V, temperature)[:, :, None]
    return log_probs_around(z_nV, ids_nK, Support(*taken, off_max_n1), sum_n1, temperature)
