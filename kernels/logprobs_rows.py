"""The rows of `linear_logprobs` in Triton: selection of the largest logits, and what one read of a row gives.

Shape suffixes: ``n`` rows of a chunk, ``V`` vocabulary in use, ``B`` logits read at a time, one a lane. No atomics.
"""

import triton
import triton.language as tl

from bbopd.kernels.logits import WARPS, temper

__all__ = ["WARPS", "row_logprobs", "tile_top_k"]

BLOCK = 4096  # 16 logits a thread, as four 16-byte loads in flight


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
