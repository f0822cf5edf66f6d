"""Several replicas of a teacher, real processes behind real proxies: slow, dead, away for a while, and no replicas at all."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from bbopd.errors import TeacherError
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Offer, Rollout, SignalSpec
from tests.fault_proxy import FaultProxy, proxied
from tests.fault_registry import fault
from tests.fault_server import FaultyTeacher, serving
from tests.faults import assert_nothing_lost, connected, make_rollouts, score_all, score_while
from tests.serve_fake import VOCAB, end_process, processes, start_process
from tests.waiting import PATIENCE, hasty, hurried, time_passes, until, unused_port

WANT = SignalSpec("topk", 1.3, 8)
BACKEND = FakeBackend(VOCAB)  # computes what the processes answer


@pytest.fixture(scope="module")
def replica_ports() -> Iterator[list[int]]:
    """Three processes, for tests that reach them through proxies and leave them alone."""
    with processes(3, delay=0.01, batch_tokens=200) as started:
        yield [port for _, port in started]


@pytest.fixture
async def equal_ports() -> AsyncIterator[list[int]]:
    """Three in this process, for tests of their speed: what else the machine does slows all of them alike."""
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(serving(FaultyTeacher(BACKEND))) for _ in range(3)]


@contextlib.asynccontextmanager
async def proxies(ports: list[int]) -> AsyncIterator[list[FaultProxy]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(proxied(port, seed)) for seed, port in enumerate(ports)]


async def test_work_is_spread_over_the_replicas(equal_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(equal_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:
        for proxy in through:
            proxy.delay = 0.05
        scored = await score_all(teacher, rollouts, WANT)
        assert not any(teacher.counters.values())
        passed = [proxy.to_client for proxy in through]
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)
    assert min(passed) > 0.5 * max(passed)


@fault("one replica much slower than the others", "gives it less to do")
async def test_a_slow_replica_gets_less(equal_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(equal_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:
        through[0].delay = 0.4
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

        scored = await score_while(teacher, rollouts, WANT, kill_two)
        assert teacher.counters["moved"] > 0
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault(
    "one of three replicas a black hole", "its items go to the others after half of `teacher.timeout`; it is asked for little from then on"
)
@hasty
async def test_a_replica_that_becomes_a_black_hole(replica_ports):
    rollouts = make_rollouts(300, VOCAB)
    async with proxies(replica_ports) as through, connected(*(proxy.port for proxy in through), inflight_tokens=300) as teacher:

        async def swallow() -> None:
            through[1].is_black_hole = True
            async with hurried():
                await until(lambda: teacher.counters["moved"])

        scored = await score_while(teacher, rollouts, WANT, swallow)
        assert teacher.counters["moved"] > 0
    assert_nothing_lost(BACKEND, rollouts, scored, WANT)


@fault("rolling restart", "each replica's items go to the others while it is away; it gets work again when it is back")
async def test_a_rolling_restart():
    ports = [unused_port() for _ in range(3)]
    with contextlib.ExitStack() as stack:
        rollouts = make_rollouts(500, VOCAB)
        started = [stack.enter_context(processes(1, port=port, delay=0.02, batch_tokens=100))[0] for port in ports]
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
            async with connected(*ports, inflight_tokens=200, timeout=2 * PATIENCE) as teacher:

                async def source() -> AsyncIterator[Rollout]:
                    for number, rollout in enumerate(rollouts):
                        if number >= 60 and (restarting is None or not restarting.done()):
                            await asyncio.sleep(0.01)  # the pass goes on for as long as the restart takes
                        if number == 400:
                            await until(lambda: teacher.counters["reconnects"])
                        yield rollout

                async for item in teacher.score(source(), WANT):
                    scored.append(item)
                    if len(scored) == 20:
                        restarting = asyncio.create_task(restart_each())
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
@hasty
async def test_all_replicas_gone(replica_ports):
    async with proxies(replica_ports[:2]) as through, connected(*(proxy.port for proxy in through)) as teacher:

        async def kill_all() -> None:
            for proxy in through:
                await proxy.kill()
            await until(lambda: teacher.counters["reconnects"] >= 2)
            await time_passes()

        with pytest.raises(TeacherError, match=r"has not answered for 60 s .*last trouble: .*; .*\d+ rollouts were scored, unanswered: r"):
            await score_while(teacher, make_rollouts(3000, VOCAB), WANT, kill_all)


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
