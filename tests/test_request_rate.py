"""Requests a second of one client: the bucket by a clock of its own, then the server and the client that keeps to it."""

from __future__ import annotations

import asyncio
import time

import grpc
import pytest

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.clients import ClientLimits
from bbopd.rpc.codec import encode_item
from bbopd.rpc.request_rate import RequestRate
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from tests.fault_registry import fault
from tests.faults import make_rollouts, score_all
from tests.test_server import VOCAB, WANT, next_answer, open_stream, rollout, running
from tests.test_server_limits import failure_of, prompts


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("per_second", "burst"), [(5.0, 5), (1.0, 1), (0.25, 1), (2.5, 2)])
def test_in_the_long_run_no_more_than_the_rate_however_it_is_asked(per_second, burst):
    clock = Clock()
    rate = RequestRate(per_second, clock)
    granted = 0
    while rate.take("a") == 0.0:
        granted += 1
    assert granted == burst
    for step in range(1, 2000):  # asking ten times too often
        clock.now = 100.0 + step / (10 * per_second)
        granted += rate.take("a") == 0.0
    assert abs(granted - burst - 199) <= 1
    assert rate.take("b") == 0.0, "another client has its own"


def test_the_time_it_names_is_enough_and_no_more():
    clock = Clock()
    rate = RequestRate(4.0, clock)
    while not (wait := rate.take("a")):
        pass
    clock.now += wait - 1e-3
    assert rate.take("a") == pytest.approx(1e-3, abs=1e-6)
    clock.now += 1e-3
    assert rate.take("a") == 0.0


def test_what_is_remembered_of_clients_is_bounded_and_leaving_resets_nothing():
    clock = Clock()
    rate = RequestRate(1.0, clock)
    for number in range(10_000):
        clock.now += 0.01
        assert rate.take(f"c{number}") == 0.0
    assert len(rate) < 1200
    assert rate.take("c9999") > 0.9


@fault(
    "more requests a second than a client may make", "the item fails, with the time to ask again; bbopd's client keeps to what is announced"
)
async def test_requests_beyond_the_rate_are_refused_before_the_model_and_granted_later():
    backend = FakeBackend(VOCAB)
    async with running(backend, limits=ClientLimits(requests_per_second=1.0)) as (_, _, stub):
        call = await open_stream(stub)  # the first request
        for number in range(6):
            await call.write(encode_item(number, rollout(number), WANT))
        outcomes = [await next_answer(call) for _ in range(6)]
        refused = [failure_of(one) for one in outcomes if one.WhichOneof("kind") == "failure"]
        assert len(refused) >= 3, "a machine that pauses for a second earns a request"
        assert {one.code for one in refused} == {pb.FAILURE_CODE_OVER_LIMIT}
        assert all(one.retryable and 0 < one.retry_after_seconds <= 1.0 for one in refused)
        assert "this client may make 1 requests a second; ask again in" in refused[0].message
        assert sum(backend.calls) == 6 - len(refused)
        call.cancel()
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await ask_on(stub)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "a generate call: this client may make 1 requests a second" in error.value.details()
        await asyncio.sleep(float(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) / 1000 + 0.05)
        assert (await open_stream(stub)) is not None


async def ask_on(stub):
    """Ask until it is refused: a machine that pauses for a second earns a request."""
    while True:
        await stub.Generate(prompts(1)).read()


async def test_a_client_keeps_to_the_rate_that_is_announced():
    async with running(FakeBackend(VOCAB), limits=ClientLimits(requests_per_second=20.0)) as (server, _, _):
        teacher = await RemoteTeacher.connect(server.target)
        try:
            assert teacher.info.max_requests_per_second == 20.0
            started = time.monotonic()
            rollouts = make_rollouts(20, VOCAB)
            scored = await score_all(teacher, rollouts, WANT)
            assert len(scored) == 20
            assert time.monotonic() - started > 19 / 20.0
            assert teacher.counters["retries"] == 0
        finally:
            await teacher.close()
