"""`linear_logprobs` with Triton: a chunk's logits by matrix product, then a kernel that reads each row once.

Asked for top-k or candidates, it reads a row twice: for the largest of each of its tiles, and for the sum of what no list holds.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` top-k,
``M`` candidates, ``B`` logits read at a time, one a lane.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbopd import op_checks
from bbopd.kernels.logits import CHUNK_LOGITS, INTERPRETED, WARPS, Logits, check_device, statistics, temper
from bbopd.reference_distill import head_of
from bbopd.reference_logprobs import empty_results, linear_logprobs_with, log_probs_around
from bbopd.reference_math import Support, take_ids
from bbopd.types import TokenLogprobs

__all__ = ["INTERPRETED", "linear_logprobs"]

BLOCK = 4096  # 16 logits a thread, as four 16-byte loads in flight


def linear_logprobs(hidden: Tensor, weight: Tensor, **options: Any) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs`, on arguments of the right shapes.

    Parameters
    ----------
    chunk_tokens : int
        Tokens whose logits exist at a time; 0 takes as many as make 512 MB with what is kept of them.
    the rest
        As in `bbopd.ops.linear_logprobs`. On a GPU nobody checks ids: one outside the vocabulary gets NaN.

    Raises
    ------
    ValueError
        float64 inputs, tensors that are not on a GPU; on a CPU, in the interpreter, also ids or logits that do not fit.
    """
    check_device(hidden, weight)
    return linear_logprobs_with(_linear_logprobs, hidden, weight, **options)


@torch.library.custom_op("bbopd::linear_logprobs_triton", mutates_args=())
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
    N, V, device = hidden.shape[0], vocab_size, hidden.device
    if check:
        op_checks.check_scored_ids(token_ids, candidate_ids, V)
    found = logsumexp_N, sampled_N, topk_ids_NK, topk_NK, log_tail_N, candidates_NM, candidates_tail_N = empty_results(
        hidden, token_ids, candidate_ids, top_k, torch.float32
    )
    token_ids = None if token_ids is None else token_ids.contiguous()
    tiles, kept = triton.cdiv(V, BLOCK), min(top_k, BLOCK)
    chunk = min(chunk_tokens or max(1, CHUNK_LOGITS // (V + 2 * tiles * kept)), max(N, 1))  # a key is as long as two logits
    with torch.autocast(device.type, enabled=False), torch.accelerator.device_index(device.index):
        logits = Logits(head_of(hidden, weight, bias, logit_scale, logit_softcap, V), chunk)
        keys = torch.empty(chunk, tiles, kept, dtype=torch.int64, device=device)
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            n = rows.stop - start
            tokens_n = None if token_ids is None else token_ids[rows]
            if not top_k and candidate_ids is None:
                row_logprobs[(n,)](
                    logits.multiply(rows),
                    logits.bias_S,
                    tokens_n,
                    logsumexp_N[rows],
                    sampled_N[rows],
                    V,
                    logits.stride,
                    logits.inner,
                    logits.outer / temperature,
                    BLOCK=BLOCK,
                    num_warps=WARPS,
                    enable_fp_fusion=True,  # its default differs between Triton's versions
                )
            else:
                z_nS = logits.write(rows)
                z_n1 = None if tokens_n is None else _at(z_nS, V, tokens_n[:, None])
                if top_k:
                    topk_ids_NK[rows] = ids_nK = top_k_ids(z_nS, V, top_k, keys[:n])
                    topk_NK[rows], log_tail_N[rows], lse_n1 = _around(z_nS, V, ids_nK, temperature)
                if candidate_ids is not None:
                    ids_nM = candidate_ids[rows].long()
                    beyond_nM = ids_nM >= V
                    log_probs_nM, candidates_tail_N[rows], lse_n1 = _around(z_nS, V, ids_nM.masked_fill(beyond_nM, -1), temperature)
                    candidates_NM[rows] = log_probs_nM.masked_fill(beyond_nM, torch.nan)
                logsumexp_N[rows] = lse_n1[:, 0]
                if z_n1 is not None:
                    sampled_N[rows] = (z_n1 / temperature - lse_n1)[:, 0]
            if check:
                op_checks.check_student_rows(logsumexp_N[rows], start)
    return found


def _at(z_nS: Tensor, V: int, ids_n1: Tensor) -> Tensor:
    """The logits of ids, NaN where one is outside the vocabulary."""
    inside_n1 = (ids_n1 >= 0) & (ids_n1 < V)
    return z_nS.gather(1, torch.where(inside_n1, ids_n1, 0).long()).masked_fill(~inside_n1, torch.nan)


def top_k_ids(z_nS: Tensor, V: int, k: int, keys: Tensor) -> Tensor:
    """Ids of the ``k`` largest of each row, largest first, of equal ones the lower id first, [n, k]; ``keys`` [n, tiles, kept] is room."""
    tile_top_k[keys.shape[:2]](z_nS, keys, V, z_nS.stride(0), keys.shape[2], BLOCK=BLOCK, num_warps=WARPS)
    return ~torch.topk(keys.flatten(1), k).values & 0xFFFFFFFF  # no two keys are equal: there is one answer


def _around(z_nS: Tensor, V: int, ids_nK: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """`log_probs_around` the ids, which leave the row, so that the tail is a sum of what is left, and return to it."""
    z_nV = z_nS[:, :V]
    taken = take_ids(z_nV, ids_nK)
    off_max_n1, sum_n1, _ = statistics(z_nS, V, temperature)[:, :, None]
    return log_probs_around(z_nV, ids_nK, Support(*taken, off_max_n1), sum_n1, temperature)


@_linear_logprobs.register_fake
def _(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor | None, candidate_ids: Tensor | None, top_k: int, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return empty_results(hidden, token_ids, candidate_ids, top_k, torch.float32)


@triton.jit
def tile_top_k(
    logits,  # [n, stride] float32
    keys,  # [n, tiles, kept] int64, written: of each BLOCK logits the largest, in no particular order
    V,
    stride,
    kept,  # 1 to BLOCK
    BLOCK: tl.constexpr,
):
    """A logit and its id as one number: the larger logit is the larger key, and of equal logits the lower id. One program a tile.

    The bits of the smallest logit kept are found one by one, the highest first, with the tile in registers (radix select; Alabi et al.,
    "Fast k-selection algorithms for graphics processing units", 2012).
    """
    row, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column_B = tile * BLOCK + tl.arange(0, BLOCK)
    z_B = tl.load(logits + row * stride + column_B, mask=column_B < stride, other=0.0)
    bits_B = tl.where(z_B == 0.0, 0.0, z_B).to(tl.int32, bitcast=True)  # -0 becomes 0
    signed_B = tl.where(column_B < V, bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF), -0x80000000)  # what is no logit comes last, after any NaN
    order_B = signed_B.to(tl.uint32, bitcast=True) ^ 0x80000000
    cut = tl.full([], 0, tl.uint32)
    bit = tl.full([], 0x80000000, tl.uint32)
    for _ in range(32):
        count = tl.sum((order_B >= (cut | bit)).to(tl.int32), 0)
        cut = tl.where(count >= kept, cut | bit, cut)
        bit = bit >> 1
    above_B, equal_B = (order_B > cut).to(tl.int32), (order_B == cut).to(tl.int32)
    # lanes ascend by id, so that of the equal ones the first are kept
    place_B = tl.where(above_B != 0, tl.cumsum(above_B, 0), tl.sum(above_B, 0) + tl.cumsum(equal_B, 0)) - 1
    key_B = (signed_B.to(tl.int64) << 32) | (0xFFFFFFFF - column_B.to(tl.int64))
    keys += (row * tl.num_programs(1) + tile) * kept
    tl.store(keys + place_B, key_B, mask=(above_B + equal_B != 0) & (place_B < kept))


@triton.jit
def row_logprobs(
    logits,  # [n, stride] float32: hidden @ weight.T, the first V of each row
    bias,  # [stride] float32, or None
    token_ids,  # [n] integers, or None
    logsumexp,  # [n] float32, written
    sampled,  # [n] float32, written where there are token_ids
    V,
    stride,
    inner,  # logit_scale / logit_softcap, or None without a cap
    outer,  # (logit_softcap, without it logit_scale) / temperature
    BLOCK: tl.constexpr,
):
    """The logsumexp of a row of tempered logits and the log-probability of its token: one program a row, no atomics.

    Every lane keeps the maximum and the sum of its own logits (online softmax, Milakov & Gimelshein 1805.02867, algorithm 3), so that lanes
    meet once, at the end of the row, always in the same order.
    """
    row = tl.program_id(0).to(tl.int64)
    lane_B = tl.arange(0, BLOCK)
    max_B = tl.full([BLOCK], -1e38, tl.float32)  # not -inf: masked logits would make inf - inf of it
    sum_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column_B = first + lane_B
        # the padding is read too, whatever it holds: a mask of V would leave single loads where V is odd
        readable_B = column_B < stride
        u_B = temper(tl.load(logits + row * stride + column_B, mask=readable_B, other=0.0), bias, column_B, readable_B, inner, outer)
        gap_B = tl.where(column_B < V, u_B, float("-inf")) - max_B
        # one exponential rescales the sum where the maximum rises, and adds to it where it does not
        factor_B = tl.exp(-tl.abs(gap_B))
        sum_B = tl.where(gap_B > 0.0, sum_B * factor_B + 1.0, sum_B + factor_B)
        max_B = tl.where(gap_B > 0.0, u_B, max_B)
    row_max = tl.max(max_B, 0)
    row_lse = row_max + tl.log(tl.sum(sum_B * tl.exp(max_B - row_max), 0))
    tl.store(logsumexp + row, row_lse)
    if token_ids is not None:
        token = tl.load(token_ids + row).to(tl.int64)
        inside = (token >= 0) & (token < V)
        z = tl.load(logits + row * stride + token, mask=inside, other=float("nan"))
        tl.store(sampled + row, temper(z, bias, token, inside, inner, outer) - row_lse)
