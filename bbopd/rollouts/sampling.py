"""Drawing one token a row, with a random stream of its own for every rollout.

Shapes: ``B`` rows, ``V`` vocabulary, ``K`` kept ids, ``T`` new tokens.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bbopd.errors import ModelError
from bbopd.types import Sampling

_BLOCK = 256
_LAST = 1.0 - 1e-12  # keeps a scaled uniform strictly below the total, so that an entry of probability 0 is never drawn


def draw_uniforms(seed: int, draw: int, count: int) -> Tensor:
    """The ``count`` uniform numbers [T] float64 in [0, 1) of rollout ``draw``: a function of (seed, draw) and nothing else."""
    return torch.from_numpy(np.random.default_rng([seed % 2**64, draw]).random(count)).clamp_(max=_LAST)


def sample_tokens(logits: Tensor, uniforms: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw a token from every row of ``logits`` [B, V] (float32 logits are overwritten) with ``uniforms`` [B] float64.

    Returns
    -------
    ids [B] int64; logprobs [B] float32, nats, in the distribution drawn from: at the temperature, and renormalised
    over what top-k and top-p keep.

    Raises
    ------
    ModelError
        If a row holds NaN, +inf or nothing but -inf.
    """
    weights_BV = _exponentials(logits, sampling.temperature)
    if sampling.top_k or sampling.top_p < 1.0:
        return _draw_from_kept(weights_BV, uniforms, sampling)
    return _draw(weights_BV, uniforms)


def _exponentials(logits: Tensor, temperature: float) -> Tensor:
    """exp((z - max z) / T) [B, V] float32, in place."""
    z_BV = logits.float()
    z_BV -= z_BV.amax(-1, keepdim=True)
    if temperature != 1.0:
        z_BV /= temperature
    return z_BV.exp_()


def _check(total_B: Tensor) -> None:
    if not bool(torch.isfinite(total_B).all()):
        raise ModelError(
            "the student's logits are NaN or infinite: its weights have diverged; lower train.lr, or resume an older checkpoint"
        )


def _draw(weights_BV: Tensor, uniforms_B: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform in two levels, blocks and then the entries of one: two passes over V, and float64 where sums grow long."""
    B, V = weights_BV.shape
    whole = V // _BLOCK * _BLOCK
    parts = [weights_BV[:, :whole].view(B, -1, _BLOCK).sum(-1)]
    if whole < V:
        parts.append(weights_BV[:, whole:].sum(-1, keepdim=True))
    blocks = torch.cat(parts, dim=1).double()
    sums = blocks.cumsum(-1)
    total_B = sums[:, -1]
    _check(total_B)
    target_B1 = (uniforms_B * total_B)[:, None]
    block_B1 = torch.searchsorted(sums, target_B1, right=True).clamp_(max=blocks.shape[1] - 1)
    size_B1 = blocks.gather(1, block_B1)
    share_B1 = ((target_B1 - (sums.gather(1, block_B1) - size_B1)) / size_B1).clamp_(0.0, _LAST)

    columns = block_B1 * _BLOCK + torch.arange(_BLOCK, device=weights_BV.device)
    inside = weights_BV.gather(1, columns.clamp(max=V - 1)).double()
    inside = inside.masked_fill_(columns >= V, 0.0).cumsum(-1)
    ids_B1 = block_B1 * _BLOCK + torch.searchsorted(inside, share_B1 * inside[:, -1:], right=True)
    logprobs_B1 = (weights_BV.gather(1, ids_B1).double() / total_B[:, None]).log()
    return ids_B1[:, 0], logprobs_B1[:, 0].float()


def _draw_from_kept(weights_BV: Tensor, uniforms_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """As `_draw`, among the best ``top_k`` and, of those, the fewest that hold ``top_p`` of their mass."""
    V = weights_BV.shape[1]
    kept_BK, ids_BK = weights_BV.topk(min(sampling.top_k or V, V), dim=-1)
    kept_BK = kept_BK.double()
    _check(kept_BK.sum(-1))
    before_BK = kept_BK.cumsum(-1) - kept_BK
    kept_BK = kept_BK.masked_fill(before_BK >= sampling.top_p * kept_BK.sum(-1, keepdim=True), 0.0)
    sums_BK = kept_BK.cumsum(-1)
    total_B1 = sums_BK[:, -1:]
    slot_B1 = torch.searchsorted(sums_BK, uniforms_B[:, None] * total_B1, right=True)
    logprobs_B1 = (kept_BK.gather(1, slot_B1) / total_B1).log()
    return ids_BK.gather(1, slot_B1)[:, 0], logprobs_B1[:, 0].float()
