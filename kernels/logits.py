"""What both ops in Triton do with rows of logits: finish them, and take their statistics.

Shape suffixes: ``n`` rows of a chunk, ``V`` vocabulary in use, ``B`` logits read at a time.
"""

from typing import Any

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on tensors of any device; ``TRITON_INTERPRET`` decides as this module is imported."""

BLOCK, WARPS = 2048, 8  # 8 logits a thread, a teacher's beside them
LAUNCH: dict[str, Any] = {"BLOCK": BLOCK, "num_warps": WARPS, "enable_fp_fusion": False}  # equal logits have a divergence of exactly 0
NO_MAXIMUM = tl.constexpr(-1e38)  # not -inf: masked logits would make inf - inf of it
_INFINITY_STAND_IN = tl.constexpr(1e30)  # a teacher logit of +inf takes all the mass of its row, without inf - inf


@triton.jit
def temper(z, bias, column, readable, inner, outer):
    """``softcap(logit_scale * (z + bias)) / temperature``, by the factors inside and outside the cap."""
    if bias is not None:
        z += tl.load(bias + column, mask=readable, other=0.0)
    if inner is not None:
        # tanh by an exponential that cannot overflow
        decay = tl.exp(-2.0 * tl.abs(z * inner))
        tanh = (1.0 - decay) / (1.0 + decay)
        z = tl.where(z * inner < 0.0, -tanh, tanh)
    return z * outer


@triton.jit
def load_logits(row, column_B, V, width, is_read, IS_TEACHER: tl.constexpr):
    """A row's logits at the columns, in float32: -inf beyond the vocabulary, 0 where the row is not read."""
    z_B = tl.load(row + column_B, mask=(column_B < width) & is_read, other=0.0).to(tl.float32)
    if IS_TEACHER:
        z_B = tl.where(z_B > _INFINITY_STAND_IN, _INFINITY_STAND_IN, z_B)  # NaN stays
    return tl.where(column_B < V, z_B, float("-inf"))


@triton.jit
def is_set(mask, row):
    found = True
    if mask is not None:
        found = tl.load(mask + row).to(tl.int1)
    return found


@triton.jit
def finish_logits(
    logits,  # [n, stride] float32: hidden @ weight.T, overwritten by softcap(logit_scale * (logits + bias))
    bias,  # [stride] float32, or None
    stride,
    inner,  # logit_scale / logit_softcap, or None without a cap
    outer,  # logit_softcap, without it logit_scale
    BLOCK: tl.constexpr,
):
    logits += tl.program_id(0).to(tl.int64) * stride
    for first in range(0, stride, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        inside_B = column_B < stride
        z_B = temper(tl.load(logits + column_B, mask=inside_B, other=0.0), bias, column_B, inside_B, inner, outer)
        tl.store(logits + column_B, z_B, mask=inside_B)


@triton.jit
def row_statistics(
    logits,  # [n, width or more] of any float type
    signal,  # [n] bool: rows to read, or None for all
    statistics,  # [3, n] float32, written: the row's maximum m, the sums of exp((z - m) / T) and of exp(z - m)
    V,
    width,  # columns that may be read, V or more: a mask of V would leave single loads where V is odd
    stride,
    inverse_temperature,  # 1 / T, or None at T = 1
    AT_ONE: tl.constexpr,  # whether the second sum is wanted
    IS_TEACHER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Online softmax (Milakov & Gimelshein 1805.02867, algorithm 3), lane by lane. A row of nothing but -inf gives (0, 0, 0)."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.num_programs(0)
    is_read = is_set(signal, row)
    max_B = tl.full([BLOCK], NO_MAXIMUM, tl.float32)
    sum_B = tl.zeros([BLOCK], tl.float32)
    sum_1_B = tl.zeros([BLOCK], tl.float32)
    for first in range(0, V, BLOCK):
        column_B = first + tl.arange(0, BLOCK)
        z_B = load_logits(logits + row * stride, column_B, V, width, is_read, IS_TEACHER)
        rises_B = z_B > max_B
        drop_B = -tl.abs(z_B - max_B)
        # one exponential rescales the sum where the maximum rises, and adds to it where it does not
        if inverse_temperature is not None:
            factor_B = tl.exp(drop_B * inverse_temperature)
        else:
            factor_B = tl.exp(drop_B)
        sum_B = tl.where(rises_B, sum_B * factor_B + 1.0, sum_B + factor_B)
        if AT_ONE:
            factor_B = tl.exp(drop_B)
            sum_1_B = tl.where(rises_B, sum_1_B * factor_B + 1.0, sum_1_B + factor_B)
        max_B = tl.where(rises_B, z_B, max_B)
    row_max = tl.max(max_B, 0)
    drop_B = max_B - row_max
    row_sum_1 = tl.sum(sum_1_B * tl.exp(drop_B), 0)
    if inverse_temperature is not None:
        drop_B = drop_B * inverse_temperature
    row_sum = tl.sum(sum_B * tl.exp(drop_B), 0)
    tl.store(statistics + row, tl.where(row_max > NO_MAXIMUM, row_max, 0.0))
    tl.store(statistics + n + row, row_sum)
    tl.store(statistics + 2 * n + row, row_sum_1)
