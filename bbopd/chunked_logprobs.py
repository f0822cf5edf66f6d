"""`linear_logprobs` on a GPU: a chunk's logits by matrix product, then an engine's kernel that reads each row once.

Asked for top-k or candidates, a row is read more often: for the largest of it, and for the sum of what no list holds.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` top-k,
``M`` candidates.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.chunked_logits import CHUNK_LOGITS, Logits, RowKernels
from bbopd.reference_logprobs import Scoring, log_probs_around
from bbopd.reference_math import Support, take_ids


def run(kernels: RowKernels, case: Scoring) -> None:
    """Fill in the results of ``case``; an id outside the vocabulary gets NaN.

    Logits of ``case.chunk_tokens`` tokens exist at a time; 0 takes as many as make 512 MB with what is kept of them.
    """
    N, V, K = case.head.hidden.shape[0], case.head.weight.shape[0], case.top_k
    token_ids = None if case.token_ids is None else case.token_ids.contiguous()
    selection = kernels.selection_bytes(V, K) if K else 0
    chunk = min(case.chunk_tokens or max(1, 4 * CHUNK_LOGITS // (4 * V + selection)), max(N, 1))
    with torch.accelerator.device_index(case.logsumexp.device.index):
        logits = Logits(kernels, case.head, chunk)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            tokens_n = None if token_ids is None else token_ids[rows]
            if not K and case.candidate_ids is None:
                kernels.logprobs(logits, rows, case.temperature, tokens_n, case.logsumexp[rows], case.sampled[rows])
            else:
                _fill(kernels, case, logits.write(rows), V, rows, tokens_n)
            if case.check:
                op_checks.check_student_rows(case.logsumexp[rows], start)


def _fill(kernels: RowKernels, case: Scoring, z_nS: Tensor, V: int, rows: slice, tokens_n: Tensor | None) -> None:
    """Fill in the results of ``rows`` from their logits, with top-k or candidates."""
    z_n1 = None if tokens_n is None else _at(z_nS, V, tokens_n[:, None])
    if case.top_k:
        case.topk_ids[rows] = ids_nK = kernels.top_k(z_nS, V, case.top_k)
        case.topk_logprobs[rows], case.log_tail[rows], lse_n1 = _around(kernels, z_nS, V, ids_nK, case.temperature)
    if case.candidate_ids is not None:
        ids_nM = case.candidate_ids[rows].long()
        beyond_nM = ids_nM >= V
        found_nM = _around(kernels, z_nS, V, ids_nM.masked_fill(beyond_nM, -1), case.temperature)
        log_probs_nM, case.candidates_log_tail[rows], lse_n1 = found_nM
        case.candidates[rows] = log_probs_nM.masked_fill(beyond_nM, torch.nan)
    case.logsumexp[rows] = lse_n1[:, 0]
    if z_n1 is not None:
        case.sampled[rows] = (z_n1 / case.temperature - lse_n1)[:, 0]


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
