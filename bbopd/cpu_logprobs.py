"""`linear_logprobs` in C++: one pass over the vocabulary, tile by tile.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary in use, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd import op_checks
from bbopd.cpu_tensors import LEVELS, address_of, cpu_level, floats_of, head_tuple, rows_of
from bbopd.reference_logprobs import empty_results, linear_logprobs_with
from bbopd.types import TokenLogprobs


def linear_logprobs(*arguments: Any, **options: Any) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs`, on arguments of the right shapes and dtypes, those that `bbopd.cpu_tensors.takes` accepts."""
    return linear_logprobs_with(_linear_logprobs, *arguments, **options)


@torch.library.custom_op("bbopd::linear_logprobs_cpu", mutates_args=())
def _linear_logprobs(
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
    from bbopd._C import linear_logprobs as logprobs

    op_checks.check_scored_ids(token_ids, candidate_ids, vocab_size)
    found = logsumexp_N, sampled_N, topk_ids_NK, topk_NK, log_tail_N, candidates_NM, candidates_tail_N = empty_results(
        hidden, token_ids, candidate_ids, top_k, torch.float32
    )
    if hidden.shape[0] == 0:
        return found
    hidden, weight, bias_V = rows_of(hidden), rows_of(weight), floats_of(bias)
    token_id_N = None if token_ids is None else token_ids.long().contiguous()
    id_NM, order_NM = (None, None) if candidate_ids is None else candidate_ids.int().sort(1)
    logprobs(
        {
            "N": hidden.shape[0],
            "V": vocab_size,
            "K": top_k,
            "M": candidates_NM.shape[1],
            "head": head_tuple(hidden, weight, bias_V, logit_scale, logit_softcap),
            "token_ids": address_of(token_id_N),
            "candidate_ids": address_of(id_NM),
            "temperature": temperature,
            "threads": torch.get_num_threads(),
            "level": LEVELS.index(cpu_level()),
            "logsumexp": address_of(logsumexp_N),
            "sampled": address_of(sampled_N),
            "topk_ids": address_of(topk_ids_NK),
            "topk_logprobs": address_of(topk_NK),
            "log_tail": address_of(log_tail_N),
            "candidates": address_of(candidates_NM),
            "candidates_log_tail": address_of(candidates_tail_N),
        }
    )
    op_checks.check_student_rows(logsumexp_N, 0)
    if order_NM is not None:
        candidates_NM.copy_(candidates_NM.gather(1, order_NM.argsort(1)))
    return found


@_linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor | None, candidate_ids: Tensor | None, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_results(hidden, token_ids, candidate_ids, top_k, torch.float32)
