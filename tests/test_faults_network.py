"""Servers that die, hang and come back, and networks that break: real processes behind a real proxy, and nothing lost or repeated."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
import socket
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import grpc
import pytest

from bbopd.errors import TeacherError
from bbopd.rpc.answers import payload_bytes
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Offer, Prompt, Rollout, SignalSpec
from tests.fault_proxy import FaultProxy, proxied
from tests.fault_registry import fault
from tests.fault_server import FaultyTeacher, serving
from tests.faults import assert_nothing_lost, connected, make_rollouts, score_all, stream
from tests.serve_fake import VOCAB, end_process, processes, start_process

WANT = SignalSpec("topk", 1.3, 8)
BACKEND = FakeBackend(VOCAB)  # computes what the processes answer


@pytest.fixture(scope="module")
def replica_ports() -> Iterator[list[int]]:
    """Three processes, for tests that reach them through proxies and leave them alone."""
    with processes(3, delay=0.01, batch_tokens=200) as started:
        yield [port for _, port in started]


@contextlib.asynccontextmanager
async def proxies(ports: list[int]) -> AsyncIterator[list[FaultProxy]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(proxied(port, seed)) for seed, port in enumerate(ports)]


async def score_while(teacher: RemoteTeacher, rollouts: list[Rollout], happens, after: int = 20) -> list:
    """Score, and let something happen once ``after`` answers are there."""
    scored = []
    happening = None
    async for item in teacher.score(stream(rollouts), WANT):
        scored.append(item)
        if len(scored) == after:
            happening = asyncio.create_task(happens())
    assert happening is not None
    await happening
    return scored


# ---------------------------------------------------------------- one teacher


@fault("server down at start", "tries for a while, then says so, with the address and what to try; one that comes up in time is taken")
async def test_a_server_that_is_down_at_start():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TeacherError, match=rf"cannot reach a teacher at grpc://127.0.0.1:{port} within 0.3 s"):
        await RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", connect_timeout=0.3)
    connecting = asyncio.create_task(RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", connect_timeout=20))
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
    process, port = start_process(delay=0.02, batch_tokens=100)
    started = [process]
    rollouts = make_rollouts(120, VOCAB)

    async def kill_and_start() -> None:
        started[0].kill()
        started[0].wait()
        started.append((await asyncio.to_thread(start_process, port, 0.0))[0])

    try:
        async with connected(port, timeout=30) as teacher:
            scored = await score_while(teacher, rollouts, kill_and_start)
            assert teacher.counters["reconnects"] >= 1
        assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    finally:
        for each in started:
            end_process(each)


@fault("killed mid-stream, for good", "gives up after `teacher.timeout` without an answer; names what was finished and what was not")
async def test_a_killed_server_that_stays_down():
    with processes(1, delay=0.02, batch_tokens=100) as started:
        process, port = started[0]
        async with connected(port, timeout=1.5) as teacher:
            answers = teacher.score(stream(make_rollouts(60, VOCAB)), WANT)
            await anext(answers)
            process.kill()
            killed_at = time.monotonic()
            message = (
                rf"127.0.0.1:{port} has not answered for 1.5 s \(teacher.timeout\) \(last trouble: .*UNAVAILABLE.*[1-9]\d* rollouts were"
            )
            with pytest.raises(TeacherError, match=message):
                [item async for item in answers]
            assert 1.0 < time.monotonic() - killed_at < 5


@fault("the run's own teacher process ended", "does not wait for it: ends the pass at once")
async def test_a_process_that_has_ended_is_not_waited_for():
    with processes(1, delay=0.02, batch_tokens=100) as started:
        process, port = started[0]
        async with connected(port, timeout=60, is_alive=lambda: process.poll() is None) as teacher:
            answers = teacher.score(stream(make_rollouts(60, VOCAB)), WANT)
            await anext(answers)
            process.kill()
            killed_at = time.monotonic()
            with pytest.raises(TeacherError, match=r"has ended.*rollouts were scored, unanswered: r"):
                [item async for item in answers]
            assert time.monotonic() - killed_at < 5


@fault("black hole", "gives up after `teacher.timeout`, though the connection stays open")
async def test_a_black_hole(replica_ports):
    async with proxied(replica_ports[0]) as proxy, connected(proxy.port, timeout=1.0) as teacher:

        async def swallow() -> None:
            proxy.is_black_hole = True

        began = time.monotonic()
        with pytest.raises(TeacherError, match=r"has not answered for 1 s \(teacher.timeout\).*rollouts were scored, unanswered"):
            await score_while(teacher, make_rollouts(200, VOCAB), swallow)
        assert time.monotonic() - began < 8


@fault("black hole from the start", "says after the time to connect that nobody answers")
async def test_a_black_hole_from_the_start(replica_ports):
    async with proxied(replica_ports[0]) as proxy:
        proxy.is_black_hole = True
        with pytest.raises(TeacherError, match=r"cannot reach a teacher at .* within 0.5 s \((DEADLINE_EXCEEDED|UNAVAILABLE)"):
            await RemoteTeacher.connect(f"grpc://127.0.0.1:{proxy.port}", connect_timeout=0.5)


@fault("slow: delayed and throttled", "waits, as long as rows keep coming")
async def test_a_slow_network(replica_ports):
    rollouts = make_rollouts(100, VOCAB)
    async with proxied(replica_ports[0]) as proxy, connected(proxy.port, timeout=2.0, inflight_tokens=400) as teacher:
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
        async with connected(proxy.port, timeout=20) as teacher:
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


# ---------------------------------------------------------------- several replicas


async def test_work_is_spread_over_the_replicas(replica_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(replica_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:
        for proxy in through:
            proxy.delay = 0.05  # longer than what the machine's other work makes of an answer: they are equally fast
        scored = await score_all(teacher, rollouts, WANT)
        assert not any(teacher.counters.values())
        passed = [proxy.to_client for proxy in through]
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    assert min(passed) > 0.5 * max(passed)


@fault("one replica much slower than the others", "gives it less to do")
async def test_a_slow_replica_gets_less(replica_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(replica_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:
        through[0].delay = 0.15
        scored = await score_all(teacher, rollouts, WANT)
        passed = [proxy.to_client for proxy in through]
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    assert passed[0] < 0.6 * min(passed[1:])


@fault("two of three replicas dead", "the third answers what they had, and all the rest")
async def test_two_of_three_replicas_die(replica_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(replica_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:

        async def kill_two() -> None:
            await through[0].kill()
            await through[2].kill()

        scored = await score_while(teacher, rollouts, kill_two)
        assert teacher.counters["moved"] > 0
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault(
    "one of three replicas a black hole", "its items go to the others after half of `teacher.timeout`; it is asked for little from then on"
)
async def test_a_replica_that_becomes_a_black_hole(replica_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with (
        proxies(replica_ports) as through,
        connected(*(proxy.port for proxy in through), inflight_tokens=300, timeout=3.0) as teacher,
    ):

        async def swallow() -> None:
            through[1].is_black_hole = True

        scored = await score_while(teacher, rollouts, swallow)
        assert teacher.counters["moved"] > 0
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault("rolling restart", "each replica's items go to the others while it is away; it gets work again when it is back")
async def test_a_rolling_restart():
    with processes(3, delay=0.02, batch_tokens=100) as started:
        rollouts = make_rollouts(500, VOCAB)
        current = [process for process, _ in started]

        async def restart_each() -> None:
            for number, (_, port) in enumerate(started):
                current[number].send_signal(signal.SIGTERM)
                await asyncio.to_thread(current[number].wait)
                replacement = (await asyncio.to_thread(start_process, port, 0.02, 100))[0]
                current[number] = replacement
                replaced.append(replacement)

        replaced: list = []
        restarting = None
        scored = []
        try:
            async with connected(*(port for _, port in started), inflight_tokens=200, timeout=30) as teacher:
                async for item in teacher.score(stream(rollouts), WANT):
                    scored.append(item)
                    if len(scored) == 20:
                        restarting = asyncio.create_task(restart_each())
                    if restarting is not None and not restarting.done():
                        await asyncio.sleep(0.01)  # the pass goes on for as long as the restart takes
                assert restarting is not None
                await restarting
                assert teacher.counters["reconnects"] >= 1
                assert_nothing_lost(BACKEND, rollouts, scored, WANT)
                again = await score_all(teacher, rollouts[:30], WANT)
                assert_nothing_lost(BACKEND, rollouts[:30], again, WANT)
        finally:
            for process in replaced:
                end_process(process)


@fault("all teachers gone", "gives up after `teacher.timeout`, naming the last trouble of each")
async def test_all_replicas_gone(replica_ports):
    async with proxies(replica_ports[:2]) as through, connected(*(proxy.port for proxy in through), timeout=1.5) as teacher:

        async def kill_all() -> None:
            for proxy in through:
                await proxy.kill()

        began = time.monotonic()
        with pytest.raises(TeacherError, match=r"has not answered for 1.5 s .*last trouble: .*; .*\d+ rollouts were scored, unanswered: r"):
            await score_while(teacher, make_rollouts(3000, VOCAB), kill_all)
        assert time.monotonic() - began < 10


@fault("replicas that are not one teacher", "refuses to start, naming the field, both addresses and both values")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"revision": "b"}, r"revision is '' at the first and 'b' at the second"),
        ({"weights_version": 2}, r"weights_version is 0 at the first and 2"),
        ({"vocab_sha256": "0" * 64}, r"vocab_sha256 is '' at the first and '0000"),
        ({"offers": (Offer("topk", 4),)}, r"offers is \(.*at the first"),
    ],
)
async def test_replicas_that_are_not_one_teacher(changes, message):
    other = FaultyTeacher(BACKEND, infos=[dataclasses.replace(BACKEND.info, **changes)])
    async with serving(FaultyTeacher(BACKEND)) as first, serving(other) as second:
        with pytest.raises(TeacherError, match=rf"127.0.0.1:{first} and .*:{second} are not replicas of one teacher: {message}"):
            await RemoteTeacher.connect([f"grpc://127.0.0.1:{first}", f"grpc://127.0.0.1:{second}"])


@fault("replicas that describe themselves alike and answer differently", "refuses to start above `teacher.max_replica_difference`")
@pytest.mark.parametrize("want", [WANT, SignalSpec("full"), SignalSpec("sampled", 1.3)])
async def test_replicas_that_answer_differently(want):
    rollouts = make_rollouts(4, VOCAB)
    other = FakeBackend(VOCAB, sharpness=2.02)  # the same table, 1% sharper
    async with serving(FaultyTeacher(BACKEND)) as first, serving(FaultyTeacher(other)) as second:
        async with connected(first, second) as teacher:
            difference = await teacher.compare_replicas(rollouts, want, limit=0.05)
            assert 1e-4 < difference < 0.05
            message = (
                rf"replicas of fake-97-0 differ: {difference:.3g} of .* of one token of r\d lies elsewhere at .*{second} than at .*{first}"
            )
            with pytest.raises(TeacherError, match=message):
                await teacher.compare_replicas(rollouts, want, limit=difference / 2)
        async with connected(first) as teacher:
            assert await teacher.compare_replicas(rollouts, want, limit=0.0) == 0.0
