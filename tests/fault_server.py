"""A teacher that answers wrongly on purpose: the right answers of a `FakeBackend`, each spoilt in one way before it is sent."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.rpc.answers import SignalCutter
from bbopd.rpc.codec import decode_item, encode_info
from bbopd.rpc.tensors import decode_tensor, fill_tensor
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Rollout, SignalSpec, TeacherInfo

Answer = list[pb.ScoreResponse]
Spoil = Callable[[Answer], Answer]


class FaultyTeacher(teacher_pb2_grpc.TeacherServiceServicer):
    """Answers items in turn, each at once.

    Parameters
    ----------
    spoil : makes of the messages of one right answer those that are sent.
    times : answers that are spoilt, the first ones; None spoils all.
    infos : what it says of itself, in turn; the last one from then on.
    """

    def __init__(
        self, backend: FakeBackend, spoil: Spoil = lambda answer: answer, times: int | None = 1, infos: list[TeacherInfo] | None = None
    ) -> None:
        self.backend = backend
        self.asked: list[tuple[str, int]] = []
        """Every rollout asked for, with the row asked from."""
        self.streams = 0
        self.infos = infos or [backend.info]
        self._spoil = spoil
        self._left = times

    async def GetInfo(self, request, context):  # noqa: N802
        return encode_info(self.infos.pop(0) if len(self.infos) > 1 else self.infos[0])

    async def Score(self, requests, context):  # noqa: N802
        self.streams += 1
        yield pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=1, request_credit_bytes=2**20))
        async for request in requests:
            if request.WhichOneof("kind") != "item":
                continue
            rollout, want, resume_from = decode_item(request.item)
            self.asked.append((rollout.rollout_id, resume_from))
            for response in self.answer(request.item.request_id, rollout, want, resume_from):
                yield response

    def answer(self, request_id: int, rollout: Rollout, want: SignalSpec, resume_from: int) -> Answer:
        signal = self.backend.score([rollout], want)[0]
        info = self.backend.info
        answer = messages(SignalCutter(request_id, rollout, signal, info.vocab_size, resume_from, info.weights_version))
        if self._left == 0:
            return answer
        self._left = None if self._left is None else self._left - 1
        return self._spoil(answer)


@contextlib.asynccontextmanager
async def serving(service: teacher_pb2_grpc.TeacherServiceServicer) -> AsyncIterator[int]:
    """The port on which ``service`` answers; its messages may be of any size."""
    server = grpc.aio.server(options=[("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)])
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield port
    finally:
        await server.stop(0)


def messages(rows: SignalCutter) -> Answer:
    """The chunks of one answer, each alone in its message."""
    answer: Answer = []
    while not rows.is_done:
        answer.append(pb.ScoreResponse(chunk=pb.SignalChunk.FromString(b"".join(rows.cut()))))
    return answer


def seal(chunk: pb.SignalChunk) -> None:
    """Make the checksum right again, so that what was spoilt is found by what it is, not by the checksum."""
    checksum = 0
    for name in ("logits", "ids", "logprobs", "log_tail", "sampled"):
        if chunk.HasField(name):
            checksum = zlib.crc32(getattr(chunk, name).data, checksum)
    chunk.crc32 = checksum


def change(name: str, how: Callable[[np.ndarray], np.ndarray | None]) -> Spoil:
    """Change one tensor of the last message: ``how`` gets a copy, and changes it or returns another."""

    def spoil(answer: Answer) -> Answer:
        chunk = answer[-1].chunk
        array = decode_tensor(getattr(chunk, name), name).copy()
        changed = how(array)
        chunk.ClearField(name)
        fill_tensor(getattr(chunk, name), array if changed is None else changed)
        seal(chunk)
        return answer

    return spoil


def touch(how: Callable[[pb.SignalChunk], object]) -> Spoil:
    """Change the last message itself."""

    def spoil(answer: Answer) -> Answer:
        how(answer[-1].chunk)
        return answer

    return spoil
