"""`linear_logprobs` with one Triton kernel: a chunk's logits by matrix product, then each row read once.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``B`` logits read at a time, one a lane.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from bbopd import op_checks
from bbopd.types import TokenLogprobs

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether the kernel runs in Triton's interpreter, on tensors of any device; ``TRITON_INTERPRET`` decides as this module is imported."""

BLOCK, WARPS = 4096, 8  # 16 logits a thread, as four 16-byte loads in flight
_CHUNK_LOGITS = 2**27  # 512 MB of float32, enough rows to fill a GPU
ROW_ALIGNMENT = 16  # rows are padded to multiples of 64 bytes, so that they are read 16 bytes at a time whatever the vocabulary


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    *,
    token_ids: Tensor | None = None,
    temperature: float = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    vocab_size: int | None = None,
    chunk_tokens: int = 0,
) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs` without top-k and candidates, on arguments of the right shapes.

    Parameters
    ----------
    hidden : Tensor [N, D]
    weight : Tensor [V or more, D]
    token_ids : Tensor [N] of integers, optional
        On a GPU nobody checks them: an id outside the vocabulary gets NaN.
    chunk_tokens : int
        Tokens whose logits exist at a time; 0 takes as many as make 512 MB.
    temperature, bias, logit_scale, logit_softcap, vocab_size
        As in `bbopd.ops.linear_logprobs`.

    Returns
    -------
    TokenLogprobs
        ``logsumexp`` and, with ``token_ids``, ``sampled``; float32, nats.

    Raises
    ------
    ValueError
        float64 inputs, tensors that are not on a GPU; on a CPU, in the interpreter, also ids or logits that do not fit.
    """
    check_device(hidden, weight)
    logsumexp_N, sampled_N = _linear_logprobs(
        hidden.detach(),
        weight.detach(),
        None if bias is None else bias.detach(),
        token_ids,
        temperature,
        logit_scale,
        logit_softcap,
        vocab_size or weight.shape[0],
        chunk_tokens,
    )
    return TokenLogprobs(logsumexp=logsumexp_N, sampled=None if token_ids is None else sampled_N)


def check_device(hidden: Tensor, weight: Tensor) -> None:
    """Refuse what no kernel here takes."""
    if torch.float64 in (hidden.dtype, weight.dtype):
        raise ValueError(f"impl='triton' computes in float32, hidden is {hidden.dtype} and weight {weight.dtype}: use impl='reference'")
    if hidden.device.type != "cuda" and not INTERPRETED:
        raise ValueError(f"impl='triton' runs on a GPU, hidden is on {hidden.device}: move it to 'cuda', or use impl='reference'")


@torch.library.custom_op("bbopd::linear_logprobs_triton", mutates_args=())
def _linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    token_ids: Tensor | None,
    temperature: float,
    logit_scale: float,
    logit_softcap: float | None,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    N, V, device = hidden.shape[0], vocab_size, hidden.device
    check = device.type == "cpu"
    if check and token_ids is not None:
        op_checks.check_id_values("token_ids", token_ids, V)
    logsumexp_N, sampled_N = (torch.empty(N, dtype=torch.float32, device=device) for _ in range(2))
    chunk = min(chunk_tokens or max(1, _CHUNK_LOGITS // V), max(N, 1))
    stride = -(-V // ROW_ALIGNMENT) * ROW_ALIGNMENT
    buffer_nV = torch.empty(chunk, stride, dtype=torch.float32, device=device)[:, :V]
    padded_bias = None if bias is None else torch.nn.functional.pad(bias[:V].float(), (0, stride - V))
    token_ids = None if token_ids is None else token_ids.contiguous()
    with torch.autocast(device.type, enabled=False), torch.accelerator.device_index(device.index):
        weight_DV = weight[:V].float().t()
        for start in range(0, N, chunk):
            rows = slice(start, min(start + chunk, N))
            n = rows.stop - start
            logits_nV = torch.mm(hidden[rows].float(), weight_DV, out=buffer_nV[:n])
            row_logprobs[(n,)](
                logits_nV,
                padded_bias,
                None if token_ids is None else token_ids[rows],
                logsumexp_N[rows],
                sampled_N[rows],
                V,
                stride,
                None if logit_softcap is None else logit_scale / logit_softcap,
                (logit_scale if logit_softcap is None else logit_softcap) / temperature,
                BLOCK=BLOCK,
                num_warps=WARPS,
                enable_fp_fusion=True,  # its default differs between Triton's versions
            )
            if check:
                op_checks.check_student_rows(logsumexp_N[rows], start)
    return logsumexp_N, sampled_N


@_linear_logprobs.register_fake
def _(hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    N = hidden.shape[0]
    return hidden.new_empty(N, dtype=torch.float32), hidden.new_empty(N, dtype=torch.float32)


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
