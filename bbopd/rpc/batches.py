"""Several messages of a `Score` stream in one, each way: gRPC takes as long for a message as for 100 kB (``teacher.proto``, Batches)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.pieces import Pieces, inside

__all__ = ["BATCH_BYTES", "BATCH_MESSAGES", "add_part", "joined", "parts_of"]

BATCH_BYTES = 2**21
"""Payload of one batch, at most, but for a single larger message."""

BATCH_MESSAGES = 256
"""Messages in one batch, at most: all are taken in one turn of the event loop."""

Message = TypeVar("Message", pb.ScoreRequest, pb.ScoreResponse)


def add_part(request: pb.ScoreRequest, is_batch: bool) -> pb.ScoreRequest:
    """Where to write the next part of a request, in place; the request itself, which has no other part, where it is no batch."""
    return request.batch.messages.add() if is_batch else request


def joined(parts: Sequence[Pieces], is_batch: bool) -> bytes:
    """A `ScoreResponse` of several, or the one and only part itself where it is no batch."""
    if not is_batch:
        (part,) = parts
        return b"".join(part)
    messages: Pieces = []
    for part in parts:
        messages += inside(pb.ScoreResponseBatch.MESSAGES_FIELD_NUMBER, part)
    return b"".join(inside(pb.ScoreResponse.BATCH_FIELD_NUMBER, messages))


def parts_of(message: Message) -> Sequence[Message]:
    """What a message says, one after the other. Raises `ValueError` for too large a batch."""
    if message.WhichOneof("kind") != "batch":
        return (message,)
    parts = message.batch.messages
    if len(parts) > BATCH_MESSAGES:
        raise ValueError(f"a batch of {len(parts)} messages, {BATCH_MESSAGES} are allowed")
    return parts
