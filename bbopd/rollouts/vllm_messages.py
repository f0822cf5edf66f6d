"""What travels between a run and an engine on another machine: the engine's own lines of JSON, and pieces of the window of weights.

A message is one letter and a body: ``J`` and JSON, or ``W``, the place and the CRC-32 of a piece of the window (little-endian, 8 and 4
bytes), and the piece. Nothing is pickled.
"""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

_PIECE = 2**20  # bytes; messages of 1 to 2 MiB move fastest
_HEADER = struct.Struct("<cQI")


class MessageError(Exception):
    """What arrived is not a message, or not as it was sent."""


def pack_json(message: Mapping[str, Any]) -> bytes:
    return b"J" + json.dumps(message, separators=(",", ":")).encode()


def unpack_json(message: bytes) -> dict[str, Any]:
    """The object in a ``J`` message. Raises `MessageError`."""
    try:
        found = json.loads(message[1:]) if message[:1] == b"J" else None
    except ValueError as error:
        raise MessageError(f"a message of {len(message)} bytes is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise MessageError(f"a message of {len(message)} bytes that begins with {message[:8]!r} is none of this protocol")
    return found


def pack_pieces(memory: Tensor) -> Iterator[bytes]:
    """``W`` messages of all of ``memory`` [bytes] uint8, on a CPU."""
    for start in range(0, len(memory), _PIECE):
        piece = memory[start : start + _PIECE].numpy().tobytes()
        yield _HEADER.pack(b"W", start, zlib.crc32(piece)) + piece


def unpack_piece(message: bytes, size: int) -> tuple[int, bytes]:
    """Place and bytes of a ``W`` message, for a window of ``size`` bytes. Raises `MessageError`."""
    if len(message) <= _HEADER.size:
        raise MessageError(f"a piece of the weights has {len(message)} bytes, fewer than its header")
    _, start, checksum = _HEADER.unpack_from(message)
    piece = message[_HEADER.size :]
    if start + len(piece) > size:
        raise MessageError(f"a piece of the weights ends at byte {start + len(piece)} of a window of {size}")
    if zlib.crc32(piece) != checksum:
        raise MessageError(f"a piece of the weights, {len(piece)} bytes at {start}, arrived with another checksum than it was sent with")
    return start, piece
