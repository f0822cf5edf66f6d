"""Both ops with the CUDA kernels of csrc/cuda. Importing this needs ``bbopd._cuda``, which a build with nvcc has."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bbopd import chunked_distill, chunked_logprobs
from bbopd.chunked_logits import check_tensors
from bbopd.cuda_rows import CudaRows
from bbopd.reference import linear_distill_with, register
from bbopd.reference_logprobs import linear_logprobs_with
from bbopd.reference_logprobs import register as register_logprobs
from bbopd.types import DistillLoss, TokenLogprobs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["INTERPRETED", "linear_distill", "linear_logprobs"]

INTERPRETED = False
"""Whether the kernels run without a GPU."""


def linear_distill(hidden: Tensor, weight: Tensor, *arguments: Any, group: ProcessGroup | None = None, **options: Any) -> DistillLoss:
    """`bbopd.ops.linear_distill`, on arguments of the right shapes.

    Raises
    ------
    ValueError
        float64 inputs, tensors that are not on a GPU.
    RuntimeError
        A kernel could not be launched; with CUDA's own words.
    """
    check_tensors(_rows, hidden, weight, group)
    return linear_distill_with(_linear_distill, 0, hidden, weight, *arguments, group=group, **options)


def linear_logprobs(hidden: Tensor, weight: Tensor, **options: Any) -> TokenLogprobs:
    """`bbopd.ops.linear_logprobs`, on arguments of the right shapes; an id outside the vocabulary gets NaN.

    Raises
    ------
    ValueError
        float64 inputs, tensors that are not on a GPU.
    RuntimeError
        A kernel could not be launched; with CUDA's own words.
    """
    check_tensors(_rows, hidden, weight)
    return linear_logprobs_with(_linear_logprobs, hidden, weight, **options)


_rows = CudaRows(importlib.import_module("bbopd._cuda"))
_linear_distill = register(
    "bbopd::linear_distill_cuda", partial(chunked_distill.run, _rows), lambda dtype, _: chunked_distill.gradient_dtype(dtype)
)
_linear_logprobs = register_logprobs("bbopd::linear_logprobs_cuda", partial(chunked_logprobs.run, _rows))
