"""The client against a server that breaks, refuses or damages: it goes on where it broke, or ends by name."""

from __future__ import annotations

import contextlib

import grpc
import numpy as np
import pytest

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import TeacherError
from bbopd.rpc.answers import SignalCutter
from bbopd.rpc.codec import decode_item, encode_failure, encode_info
from bbopd.rpc.limits import RefusedError
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, SignalSpec
from tests.fault_server import messages
from tests.faults import collect, stream


class BreakingServer(teacher_pb2_grpc.TeacherServiceServicer):
    """A teacher of another make, that does one wrong thing to the first stream (or every stream), then behaves."""

    def __init__(self, backend: FakeBackend, fault: str, always: bool = False) -> None:
        self.backend, self.fault, self.always = backend, fault, always
        self.streams = 0
        self.received: list[str] = []
        self.resumed_from: list[int] = []

    async def GetInfo(self, request, context):  # noqa: N802
        return encode_info(self.backend.info)

    async def Score(self, requests, context):  # noqa: N802
        self.streams += 1
        misbehaves = self.always or self.streams == 1
        yield pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=1, request_credit_bytes=2**20))
        async for request in requests:
            if request.WhichOneof("kind") != "item":
                continue
            rollout, want, resume_from = decode_item(request.item)
            self.received.append(rollout.rollout_id)
            self.resumed_from.append(resume_from)
            if misbehaves and self.fault == "refuse, then break":
                if rollout.rollout_id != "r0":
                    await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went dead")
                busy = RefusedError("unavailable", "too busy", is_retryable=True, retry_after=0.5)
                yield pb.ScoreResponse(failure=encode_failure(request.item.request_id, busy))
                continue
            signal = self.backend.score([rollout], want)[0]
            rows = SignalCutter(request.item.request_id, rollout, signal, self.backend.info.vocab_size, resume_from)
            for number, response in enumerate(messages(rows)):
                if misbehaves and number == 1:
                    if self.fault == "break":
                        await context.abort(grpc.StatusCode.UNAVAILABLE, "the line went dead")
                    elif self.fault == "corrupt":
                        response.chunk.crc32 ^= 1
                        misbehaves = self.always
                    elif self.fault == "overloaded":
                        busy = RefusedError("unavailable", "too busy", is_retryable=True, retry_after=0.1)
                        yield pb.ScoreResponse(failure=encode_failure(request.item.request_id, busy))
                        misbehaves = self.always
                        break
                yield response


@contextlib.asynccontextmanager
async def breaking(fault, always=False):
    service = BreakingServer(FakeBackend(30_000), fault, always)
    server = grpc.aio.server()
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", timeout=10)
    try:
        yield teacher, service
    finally:
        await teacher.close()
        await server.stop(0)


def long_rollouts(count: int) -> list[Rollout]:
    random = np.random.default_rng(5)
    return [Rollout(f"r{n}", Prompt("p", (3,)), tuple(random.integers(0, 30_000, 60).tolist())) for n in range(count)]


def check_full(backend, scored):
    for item in scored:
        z = backend.logits(item.rollout)
        np.testing.assert_array_equal(item.signal.logits, (z - z.max(axis=1, keepdims=True)).astype(np.float16))


async def test_a_broken_stream_goes_on_where_it_broke():
    async with breaking("break") as (teacher, service):
        scored = await collect(teacher.score(stream(long_rollouts(3)), SignalSpec("full")))
        assert len(scored) == 3
        check_full(service.backend, scored)
        assert teacher.counters["reconnects"] == 1
        assert sorted(service.resumed_from) == [0, 0, 0, 26], "the first chunk held 26 rows and is not asked for again"


@pytest.mark.parametrize("fault", ["corrupt", "overloaded"])
async def test_a_bad_or_refused_item_is_asked_again(fault):
    async with breaking(fault) as (teacher, service):
        scored = await collect(teacher.score(stream(long_rollouts(3)), SignalSpec("full")))
        assert len(scored) == 3
        check_full(service.backend, scored)
        assert teacher.counters["retries"] == 1
        assert teacher.counters["bad_answers"] == (fault == "corrupt")
        assert service.streams == 1


async def test_items_are_sent_in_the_order_of_the_source_on_a_new_stream_too():
    async with breaking("refuse, then break") as (teacher, service):
        scored = await collect(teacher.score(stream(long_rollouts(4)), SignalSpec("sampled")))
        assert len(scored) == 4
        assert teacher.counters["retries"] == 1
        assert service.received[-4:] == ["r0", "r1", "r2", "r3"], "though the request for r0 is the newest"
        assert service.received[:2] == ["r0", "r1"]


async def test_bad_answers_are_retried_three_times_at_most():
    async with breaking("corrupt", always=True) as (teacher, _):
        with pytest.raises(TeacherError, match=r"failed the same item 4 times.*damaged on its way.*0 rollouts were scored"):
            await collect(teacher.score(stream(long_rollouts(1)), SignalSpec("full")))
        assert teacher.counters["retries"] == 3


async def test_a_stream_that_breaks_every_time_goes_on_as_long_as_it_gets_somewhere():
    async with breaking("break", always=True) as (teacher, service):
        scored = await collect(teacher.score(stream(long_rollouts(1)), SignalSpec("full")))
        check_full(service.backend, scored)
        assert teacher.counters["reconnects"] == 2
