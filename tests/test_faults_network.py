"""Servers that die, hang and come back, and networks that break: real processes behind a real proxy, and nothing lost or repeated."""

from __future__ import annotations

import asyncio
import dataclasses
import time
import tracemalloc
from collections.abc import Iterator

import grpc
import pytest

from bbopd.errors import TeacherError
from bbopd.rpc.answers import payload_bytes
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, SignalSpec
from tests.fault_proxy import proxied
from tests.fault_registry import fault
from tests.fault_server import FaultyTeacher, serving
from tests.faults import assert_nothing_lost, collect, connected, make_rollouts, score_all, score_while, stream
from tests.serve_fake import VOCAB, end_process, processes, start_process
from tests.waiting import PATIENCE, hasty, hurried, time_passes, until, unused_port

WANT = SignalSpec("topk", 1.3, 8)
BACKEND = FakeBackend(VOCAB)  # computes what the processes answer


@pytest.fixture(scope="module")
def healthy_port() -> Iterator[int]:
    """A process, for tests that reach it through a proxy and leave it alone."""
    with processes(1, delay=0.01, batch_tokens=200) as started:
        yield started[0][1]


@fault("server down at start", "tries for a while, then says so, with the address and what to try; one that comes up in time is taken")
async def test_a_server_that_is_down_at_start():
    port = unused_port()
    with pytest.raises(TeacherError, match=rf"cannot reach a teacher at grpc://127.0.0.1:{port} within 0.3 s"):
        await RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", connect_timeout=0.3)
    connecting = asyncio.create_task(RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", connect_timeout=PATIENCE))
    await asyncio.sleep(0.3)
    server = await start_server(BACKEND, port=port)
    try:
        teacher = await connecting
        assert teacher.info.model == BACKEND.info.model
        await teacher.close()
    finally:
        await server.stop(0)


@fault("killed mid-stream, and started again", "reconnects with growing pauses, and goes on with what was not answered")
async def test_a_killed_server_that_is_started_again():
    process, port = start_process(unused_port(), delay=0.02, batch_tokens=100)
    started = [process]
    rollouts = make_rollouts(120, VOCAB)

    async def kill_and_start() -> None:
        started[0].kill()
        started[0].wait()
        started.append((await asyncio.to_thread(start_process, port, 0.0))[0])

    try:
        async with connected(port, timeout=2 * PATIENCE) as teacher:
            scored = await score_while(teacher, rollouts, WANT, kill_and_start)
            assert teacher.counters["reconnects"] >= 1
        assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    finally:
        for each in started:
            end_process(each)


@fault("killed mid-stream, for good", "gives up after `teacher.timeout` without an answer; names what was finished and what was not")
@hasty
async def test_a_killed_server_that_stays_down():
    with processes(1, delay=0.02, batch_tokens=100) as started:
        process, port = started[0]
        async with connected(port) as teacher:
            answers = teacher.score(stream(make_rollouts(60, VOCAB)), WANT)
            await anext(answers)
            process.kill()
            reading = asyncio.create_task(collect(answers))
            await until(lambda: teacher.counters["reconnects"])
            assert not reading.done(), "it may come back"
            message = (
                rf"127.0.0.1:{port} has not answered for 60 s \(teacher.timeout\) \(last trouble: .*UNAVAILABLE.*[1-9]\d* rollouts were"
            )
            with pytest.raises(TeacherError, match=message):
                async with hurried():
                    await reading


@fault("the run's own teacher process ended", "does not wait for it: ends the pass at once")
async def test_a_process_that_has_ended_is_not_waited_for():
    with processes(1, delay=0.02, batch_tokens=100) as started:
        process, port = started[0]
        async with connected(port, timeout=3600, is_alive=lambda: process.poll() is None) as teacher:
            answers = teacher.score(stream(make_rollouts(60, VOCAB)), WANT)
            await anext(answers)
            process.kill()
            with pytest.raises(TeacherError, match=r"has ended.*rollouts were scored, unanswered: r"):
                await asyncio.wait_for(collect(answers), PATIENCE)


@fault("black hole", "gives up after `teacher.timeout`, though the connection stays open")
@hasty
async def test_a_black_hole(healthy_port):
    async with proxied(healthy_port) as proxy, connected(proxy.port) as teacher:

        async def swallow() -> None:
            proxy.is_black_hole = True
            await time_passes()

        with pytest.raises(TeacherError, match=r"has not answered for 60 s \(teacher.timeout\).*rollouts were scored, unanswered"):
            await score_while(teacher, make_rollouts(200, VOCAB), WANT, swallow)


@fault("black hole from the start", "says after the time to connect that nobody answers")
async def test_a_black_hole_from_the_start(healthy_port):
    async with proxied(healthy_port) as proxy:
        proxy.is_black_hole = True
        with pytest.raises(TeacherError, match=r"cannot reach a teacher at .* within 0.5 s \((DEADLINE_EXCEEDED|UNAVAILABLE)"):
            await RemoteTeacher.connect(f"grpc://127.0.0.1:{proxy.port}", connect_timeout=0.5)


@fault("slow: delayed and throttled", "waits, as long as rows keep coming")
async def test_a_slow_network():
    rollouts, service = make_rollouts(100, VOCAB), FaultyTeacher(BACKEND)
    async with serving(service) as port, proxied(port) as proxy, connected(proxy.port, timeout=2.0, inflight_tokens=400) as teacher:
        proxy.delay, proxy.bytes_per_second = 0.02, 60_000
        scored = await score_all(teacher, rollouts, WANT)
        assert not any(teacher.counters.values())
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault("connections reset every few kilobytes", "opens a stream again each time; rows that have arrived are not asked for again")
async def test_connections_that_are_reset_again_and_again():
    backend = FakeBackend(30_000)
    rollouts = make_rollouts(6, 30_000, length=80)  # 29 MB
    async with serving(FaultyTeacher(backend)) as port, proxied(port, seed=3) as proxy:
        proxy.reset_after = 8_000_000
        async with connected(proxy.port) as teacher:
            scored = await score_all(teacher, rollouts, SignalSpec("full"))
        assert teacher.counters["reconnects"] >= 3
        assert not teacher.counters["retries"]
        assert proxy.to_client < 1.7 * 6 * 80 * 60_000, "what had arrived was not asked for again"
    assert_nothing_lost(backend, rollouts, scored, SignalSpec("full"))


@fault("connections reset before a single row arrives", "ends the pass after six of them on one item, naming the rollout")
async def test_a_request_that_breaks_every_stream():
    class Breaking(FaultyTeacher):
        async def Score(self, requests, context):  # noqa: N802
            async for response in super().Score(requests, context):
                if response.WhichOneof("kind") == "chunk" and self.asked[-1][0] == "r3":
                    await context.abort(grpc.StatusCode.INTERNAL, "the model's process crashed")
                yield response

    async with serving(Breaking(BACKEND)) as port, connected(port) as teacher:
        message = r"broke the stream 6 times on rollout r3, at last: INTERNAL: the model's process crashed.*; 3 rollouts were scored"
        with pytest.raises(TeacherError, match=message):
            await score_all(teacher, make_rollouts(10, VOCAB), WANT)


@fault("too many calls (RESOURCE_EXHAUSTED with a pushback)", "leaves the replica alone for as long as it asks")
async def test_a_stream_that_is_pushed_back():
    class Pushing(FaultyTeacher):
        opened: list[float] = []  # noqa: RUF012

        async def Score(self, requests, context):  # noqa: N802
            self.opened.append(time.monotonic())
            if len(self.opened) == 1:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls", (("grpc-retry-pushback-ms", "700"),))
            async for response in super().Score(requests, context):
                yield response

    service = Pushing(BACKEND)
    rollouts = make_rollouts(5, VOCAB)
    async with serving(service) as port, connected(port) as teacher:
        scored = await score_all(teacher, rollouts, WANT)
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    assert service.opened[1] - service.opened[0] >= 0.7


@fault("another teacher at the same address after a restart", "ends the pass, naming what is different and both values")
async def test_another_teacher_after_a_restart():
    other = dataclasses.replace(BACKEND.info, weights_version=8)
    service = FaultyTeacher(BACKEND, infos=[BACKEND.info, other])
    async with serving(service) as port, connected(port) as teacher:
        with pytest.raises(TeacherError, match=r"is another one now: its weights_version was 0 when the run began and is 8"):
            await score_all(teacher, make_rollouts(5, VOCAB), WANT)


@fault("slow client", "takes no more from the network than two windows; the teacher waits, and is not taken for dead")
async def test_memory_is_bounded_by_the_credits():
    """Windows of 64 MiB against answers of 190 MB, by what the server was allowed to send and by what the client holds."""
    backend = FakeBackend(40_000)

    class Counting(FaultyTeacher):
        unpaid = most_unpaid = 0

        async def Score(self, requests, context):  # noqa: N802
            granted = asyncio.Event()

            async def read(queue):
                async for request in requests:
                    kind = request.WhichOneof("kind")
                    credit = request.open.answer_credit_bytes if kind == "open" else request.credit.bytes
                    self.unpaid -= credit
                    granted.set()
                    await queue.put(request)

            queue: asyncio.Queue = asyncio.Queue()
            reading = asyncio.create_task(read(queue))

            async def items():
                while True:
                    yield await queue.get()

            async for response in super().Score(items(), context):
                while self.unpaid > 0:
                    granted.clear()
                    await granted.wait()
                self.unpaid += payload_bytes(response.chunk)
                self.most_unpaid = max(self.most_unpaid, self.unpaid)
                yield response
            reading.cancel()

    service = Counting(backend)
    rollouts = [Rollout(f"r{n}", Prompt("p", (1, 2)), (7,) * 300) for n in range(8)]
    async with serving(service) as port, connected(port, timeout=1.0) as teacher:
        tracemalloc.start()
        try:
            answers = teacher.score(stream(rollouts), SignalSpec("full"))
            scored = [await anext(answers)]
            tracemalloc.reset_peak()
            await asyncio.sleep(2.5)  # longer than the time limit of the teacher
            held = len(service.asked)
            scored += [item async for item in answers]
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert held < 8, "the server was not let finish while nothing was taken"
    assert service.most_unpaid < 2 * 2**20, "never more than one message beyond what was granted"
    own = sum(item.signal.logits.nbytes for item in scored)  # all of it is in this process: what the caller keeps, and the server's own
    assert peak < own + 3 * 64 * 2**20
    assert_nothing_lost(backend, rollouts, scored, SignalSpec("full"))
