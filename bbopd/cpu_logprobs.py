"""`linear_logprobs` in C++: one pass over the vocabulary, tile by tile.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary in use, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from typing import Any

import torch

from bbopd import op_checks
from bbopd.cpu_tensors import LEVELS, address_of, cpu_level, floats_of, head_tuple, rows_of
from bbopd.reference_logprobs import Scoring, linear_logprobs_with, register
from bbopd.types import TokenLogprobs


def linear_logprobs(*arguments: Any, **options: Any) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs`, on arguments of the right shapes and dtypes, those that `bbopd.cpu_tensors.takes` accepts."""
    return linear_logprobs_with(_linear_logprobs, *arguments, **options)


def run(case: Scoring) -> None:
    """Fill in the results of ``case``."""
    from bbopd._C import linear_logprobs as logprobs

    head = case.head
    N, V = head.hidden.shape[0], head.weight.shape[0]
    if N == 0:
        return
    hidden, weight, bias_V = rows_of(head.hidden), rows_of(head.weight), floats_of(head.bias)
    token_id_N = None if case.token_ids is None else case.token_ids.long().contiguous()
    id_NM, order_NM = (None, None) if case.candidate_ids is None else case.candidate_ids.int().sort(1)
    logprobs(
        {
            "N": N,
            "V": V,
            "K": case.top_k,
            "M": case.candidates.shape[1],
            "head": head_tuple(hidden, weight, bias_V, head.scale, head.softcap),
            "token_ids": address_of(token_id_N),
            "candidate_ids": address_of(id_NM),
            "temperature": case.temperature,
            "threads": torch.get_num_threads(),
            "level": LEVELS.index(cpu_level()),
            "logsumexp": address_of(case.logsumexp),
            "sampled": address_of(case.sampled),
            "topk_ids": address_of(case.topk_ids),
            "topk_logprobs": address_of(case.topk_logprobs),
            "log_tail": address_of(case.log_tail),
            "candidates": address_of(case.candidates),
            "candidates_log_tail": address_of(case.candidates_log_tail),
        }
    )
    op_checks.check_student_rows(case.logsumexp, 0)
    if order_NM is not None:
        case.candidates.copy_(case.candidates.gather(1, order_NM.argsort(1)))


_linear_logprobs = register("bbopd::linear_logprobs_cpu", run)
