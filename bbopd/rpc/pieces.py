"""Messages with much data in them as pieces that are joined once; protobuf copies the data three times and moves it as its buffer grows.

A message is its fields one after the other, in any order, so that whatever is small is still written by protobuf.
"""

from __future__ import annotations

import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.tensors import tensor_header

__all__ = ["Pieces", "inside", "tensor_pieces"]

Pieces = list[bytes | memoryview]

_LENGTH_DELIMITED = 2  # the wire type of messages and bytes


def inside(field: int, pieces: Pieces) -> Pieces:
    """``pieces``, bytes or a whole message, as the value of the field of this number."""
    return [_varint(field << 3 | _LENGTH_DELIMITED) + _varint(sum(map(len, pieces))), *pieces]


def tensor_pieces(array: np.ndarray) -> Pieces:
    """``array`` (float16, float32, int32 or uint16) as a tensor, of which the data is a view where it is C-contiguous."""
    header, data = tensor_header(array)
    return [header.SerializeToString(), *inside(pb.Tensor.DATA_FIELD_NUMBER, [data])]


def _varint(number: int) -> bytes:
    """Seven bits a byte, the lowest first; the eighth says that more follow."""
    written = bytearray()
    while number > 0x7F:
        written.append(number & 0x7F | 0x80)
        number >>= 7
    written.append(number)
    return bytes(written)
