"""`linear_distill` with Triton."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from bbopd import chunked_distill
from bbopd.chunked_logits import check_tensors
from bbopd.kernels.rows import INTERPRETED, TritonRows
from bbopd.reference import linear_distill_with, register
from bbopd.types import DistillLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["INTERPRETED", "linear_distill"]


def linear_distill(
    hidden: Tensor, weight: Tensor, *arguments: Any, chunk_tokens: int = 0, group: ProcessGroup | None = None, **options: Any
) -> DistillLoss:
    """`bbopd.ops.linear_distill`, on arguments of the right shapes.

    Parameters
    ----------
    chunk_tokens : int
        Tokens whose logits exist at a time; 0 takes as many as make 512 MB, but 2,048 or more.

    Raises
    ------
    ValueError
        float64 inputs, tensors that are not on a GPU; on a CPU, in the interpreter, also values that do not fit.
    """
    check_tensors(_rows, hidden, weight, group)
    return linear_distill_with(_linear_distill, chunk_tokens, hidden, weight, *arguments, group=group, **options)


_rows = TritonRows()
_linear_distill = register(
    "bbopd::linear_distill_triton", partial(chunked_distill.run, _rows), lambda dtype, _: chunked_distill.gradient_dtype(dtype)
)
