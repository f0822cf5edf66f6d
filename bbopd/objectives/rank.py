"""Distributions compared by rank, where their tokens are not the same: Universal Logit Distillation's distance (Boizard et al. 2402.12030,
section 3.2: sorted probabilities, L1), with what lies below the teacher's K largest as one bucket.

Shape suffixes: ``n`` rows, ``c`` rows of a chunk, ``D`` hidden, ``V`` vocabulary, ``K`` ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bbopd.output_head import OutputHead
from bbopd.reference_math import compute_dtype, without_autocast

__all__ = ["rank_distances"]

_CHUNK_BYTES = 128 * 2**20


def rank_distances(
    hidden_nD: Tensor,
    head: OutputHead,
    logprobs_nK: Tensor,
    log_tail_n: Tensor,
    *,
    temperature: float = 1.0,
) -> Tensor:
    """``sum_k |q_(k) - p_(k)| + |q_tail - p_tail|`` of each row, [n], differentiable once by hidden, weight and bias.

    ``q_(k)`` is the k-th largest probability of the student, ``p_(k)`` the teacher's; a lower bound of the distance over all ranks, equal
    to it where the ranks below K differ in one direction. Logits exist for 128 MB of rows at a time, and are made again in backward.

    Parameters
    ----------
    logprobs_nK, log_tail_n : the teacher's largest at ``temperature``, in descending order, and the logarithm of the rest; -inf is none.
    """
    kept = head.weight_VD.shape[0] if head.vocab_size is None else head.vocab_size
    weight_VD, bias = head.weight_VD[:kept], None if head.bias is None else head.bias[:kept]
    dtype = compute_dtype(hidden_nD, weight_VD)
    rows = max(1, _CHUNK_BYTES // (dtype.itemsize * kept))

    def distances(hidden_cD: Tensor, weight_VD: Tensor, bias: Tensor | None, p_cK: Tensor, tail_c: Tensor) -> Tensor:
        with without_autocast(hidden_cD.device):
            z_cV = hidden_cD.to(dtype) @ weight_VD.to(dtype).T
        if bias is not None:
            z_cV = z_cV + bias
        z_cV = head.logit_scale * z_cV
        if head.logit_softcap is not None:
            z_cV = head.logit_softcap * torch.tanh(z_cV / head.logit_softcap)
        log_q_cV = torch.log_softmax(z_cV / temperature, dim=1)
        K = min(p_cK.shape[1], kept)
        largest = log_q_cV.topk(K, dim=1)
        rest_cV = log_q_cV.scatter(1, largest.indices, -torch.inf)
        q_tail_c = rest_cV.exp().sum(1)  # summed, not 1 minus the others
        above_c = (largest.values.exp() - p_cK[:, :K]).abs().sum(1)
        return above_c + (q_tail_c - tail_c - p_cK[:, K:].sum(1)).abs()

    parts = [hidden_nD.new_zeros(0, dtype=dtype)]
    for start in range(0, len(hidden_nD), rows):
        part = slice(start, start + rows)
        p_cK, tail_c = logprobs_nK[part].to(dtype).exp(), log_tail_n[part].to(dtype).exp()
        parts.append(checkpoint(distances, hidden_nD[part], weight_VD, bias, p_cK, tail_c, use_reentrant=False))
    return torch.cat(parts)
