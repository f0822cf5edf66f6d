"""`linear_logprobs` with Triton."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from bbopd import chunked_logprobs
from bbopd.chunked_logits import check_tensors
from bbopd.kernels.rows import INTERPRETED, TritonRows
from bbopd.reference_logprobs import linear_logprobs_with, register
from bbopd.types import TokenLogprobs

__all__ = ["INTERPRETED", "linear_logprobs"]


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
    check_tensors(_rows, hidden, weight)
    return linear_logprobs_with(_linear_logprobs, hidden, weight, **options)


_rows = TritonRows()
_linear_logprobs = register("bbopd::linear_logprobs_triton", partial(chunked_logprobs.run, _rows))
