"""What both C++ ops need of tensors: which they take, where their numbers lie, and with which instruction set they are worked on."""

from __future__ import annotations

import torch
from torch import Tensor

from bbopd.hardware import LEVELS, allowed_level

MatrixTuple = tuple[int, int, int, int, int]
HeadTuple = tuple[MatrixTuple | None, MatrixTuple | None, int, float, float]
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def cpu_level() -> str:
    """The instruction set whose kernels are used: the machine's best, or ``BBOPD_CPU_LEVEL`` where that is lower."""
    from bbopd._C import best_level

    return allowed_level(LEVELS[best_level()])


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels can work on these tensors: on a CPU, in float32, bfloat16 or float16."""
    return all(tensor is None or (tensor.device.type == "cpu" and tensor.dtype in TYPES) for tensor in tensors)


def rows_of(tensor: Tensor) -> Tensor:
    """The matrix itself where each of its rows is contiguous, else a copy."""
    return tensor if tensor.stride(1) == 1 and tensor.stride(0) >= tensor.shape[1] else tensor.contiguous()


def floats_of(tensor: Tensor | None) -> Tensor | None:
    """Contiguous float32 numbers."""
    return None if tensor is None else tensor.float().contiguous()


def matrix_of(tensor: Tensor | None) -> MatrixTuple | None:
    """Address, rows, columns, stride and type of a matrix of `rows_of`."""
    return None if tensor is None else (tensor.data_ptr(), tensor.shape[0], tensor.shape[1], tensor.stride(0), TYPES[tensor.dtype])


def address_of(tensor: Tensor | None) -> int:
    """Where a contiguous tensor begins; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def head_tuple(hidden: Tensor | None, weight: Tensor | None, bias_V: Tensor | None, scale: float, softcap: float | None) -> HeadTuple:
    """A head as C++ takes it, of tensors from `rows_of` and `floats_of`."""
    return matrix_of(hidden), matrix_of(weight), address_of(bias_V), scale, softcap or 0.0
