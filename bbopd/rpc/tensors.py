"""Arrays on the wire: dtype, shape and bytes (little-endian, C order), read without a copy.

A decoder raises `ValueError` naming the field and the value; its caller knows whose message it was.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import bbopd.rpc.teacher_pb2 as pb

__all__ = ["decode_ids", "decode_tensor", "encode_tensor", "fill_tensor", "tensor_bytes", "tensor_header"]

_DTYPES: dict[pb.Dtype, np.dtype[Any]] = {
    pb.DTYPE_FLOAT16: np.dtype("<f2"),
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_UINT16: np.dtype("<u2"),
}
_DTYPE_NUMBERS = {dtype: number for number, dtype in _DTYPES.items()}
_MOST_DIMENSIONS = 2


def encode_tensor(array: np.ndarray) -> pb.Tensor:
    """``array`` (float16, float32, int32 or uint16) as little-endian bytes in C order."""
    message = pb.Tensor()
    fill_tensor(message, array)
    return message


def fill_tensor(message: pb.Tensor, array: np.ndarray) -> None:
    """Write ``array`` into a message in place: a tensor handed to a constructor would be copied once more."""
    header, data = tensor_header(array)
    message.CopyFrom(header)
    message.data = bytes(data)


def tensor_header(array: np.ndarray) -> tuple[pb.Tensor, memoryview]:
    """A tensor without its data, and the data: little-endian bytes in C order, a view of ``array`` where it is laid out so."""
    dtype = array.dtype if array.dtype in _DTYPE_NUMBERS else array.dtype.newbyteorder("<")
    data = np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data
    return pb.Tensor(dtype=_DTYPE_NUMBERS[dtype], shape=array.shape), data


def tensor_bytes(message: pb.Tensor) -> int:
    """Length of a tensor's data by its shape, without touching (copying) the data; 0 where dtype or shape is none that is ever sent."""
    dtype = _DTYPES.get(message.dtype)
    return math.prod(message.shape) * dtype.itemsize if dtype is not None and len(message.shape) <= _MOST_DIMENSIONS else 0


def decode_tensor(message: pb.Tensor, name: str) -> np.ndarray:
    """A read-only view of the message's bytes. Raises `ValueError` where dtype, shape and length do not agree."""
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise ValueError(f"{name} has unknown dtype {message.dtype}")
    if len(message.shape) > _MOST_DIMENSIONS:  # a product of millions of numbers would take hours
        raise ValueError(f"{name} has {len(message.shape)} dimensions, expected at most {_MOST_DIMENSIONS}")
    shape, data = tuple(message.shape), message.data
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"{name} has {len(data)} bytes, {dtype.name} {list(shape)} needs {math.prod(shape) * dtype.itemsize}")
    return np.frombuffer(data, dtype).reshape(shape)


def decode_ids(message: pb.Tensor, name: str) -> tuple[int, ...]:
    """Token ids. Raises `ValueError` where the tensor holds none."""
    ids = decode_tensor(message, name)
    if ids.dtype != np.int32 or ids.ndim != 1:
        raise ValueError(f"{name} is {ids.dtype} {list(ids.shape)}, expected int32 [tokens]")
    return tuple(ids.tolist())
