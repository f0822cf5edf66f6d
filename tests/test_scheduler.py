"""The scheduler by itself: which jobs share a call, in which order, and that nothing that goes wrong stops it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence

import numpy as np
import pytest

from bbopd.rpc.clients import Client, ClientLimits
from bbopd.rpc.jobs import Answer, Job
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.observe import Observer
from bbopd.rpc.scheduler import Scheduler
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Prompt, Rollout, SignalSpec, TeacherSignal

VOCAB = 50
SAMPLED = SignalSpec("sampled")


class Recorder(FakeBackend):
    """Keeps the rollouts of every call; ``odd`` maps a rollout to what it says of that one instead of a signal."""

    def __init__(self, odd: dict[str, object] | None = None, **options: float) -> None:
        super().__init__(VOCAB, **options)
        self.batches: list[list[str]] = []
        self.odd = odd or {}

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        self.batches.append([rollout.rollout_id for rollout in rollouts])
        signals = super().score(rollouts, want)
        return [self.odd.get(rollout.rollout_id, signal) for rollout, signal in zip(rollouts, signals, strict=True)]


@contextlib.asynccontextmanager
async def scheduling(
    backend: FakeBackend, *, batch_tokens: int = 100, max_inflight_bytes: int = 10**6, clock: Callable[[], float] = time.monotonic
) -> AsyncIterator[Scheduler]:
    scheduler = Scheduler(backend, batch_tokens=batch_tokens, max_inflight_bytes=max_inflight_bytes, observer=Observer(), clock=clock)
    try:
        yield scheduler
    finally:
        await scheduler.close()


class Caller:
    """One call with its answers; takes each at once, or, where ``takes`` is False, none. A client of its own unless one is given."""

    def __init__(self, scheduler: Scheduler, client: Client | None = None) -> None:
        self.client = client or Client("someone", ClientLimits())
        self.call = scheduler.open_call(self.client)
        self.scheduler = scheduler
        self.answers: dict[str, Answer] = {}
        self.takes = True

    def submit(self, name: str, tokens: int, want: SignalSpec = SAMPLED, answer_bytes: int = 0) -> None:
        rollout = Rollout(name, Prompt("p", (1,)), tuple(np.random.default_rng(tokens).integers(0, VOCAB, tokens - 1).tolist()))

        def deliver(answer: Answer) -> None:
            self.answers[name] = answer
            if self.takes:
                self.scheduler.release(self.call, answer_bytes)

        self.scheduler.submit(self.call, Job(want, rollout, tokens, answer_bytes, deliver))

    async def has(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.answers) < count:
                await asyncio.sleep(0.005)


SIZES = (60, 50, 30, 20, 90, 10, 10, 100, 2, 70, 40)
CUT = [[0], [1, 2, 3], [4, 5], [6], [7], [8, 9], [10]]  # in order, each call as full as the next one lets it be


@pytest.mark.parametrize("gaps", [{}, {0: 0.02}, {1: 0.02, 4: 0.02}, dict.fromkeys(range(11), 0.008)], ids=["at once", "1", "2", "all"])
async def test_a_burst_of_one_client_is_always_cut_into_the_same_calls(gaps: dict[int, float]) -> None:
    backend = Recorder(delay=0.005)
    async with scheduling(backend) as scheduler:
        caller = Caller(scheduler)
        for number, size in enumerate(SIZES):
            caller.submit(str(number), size)
            await asyncio.sleep(gaps.get(number, 0))
        await caller.has(len(SIZES))
    assert backend.batches == [[str(number) for number in call] for call in CUT]


async def test_another_kind_is_not_overtaken() -> None:
    backend = Recorder()
    async with scheduling(backend) as scheduler:
        caller = Caller(scheduler)
        for number, temperature in enumerate((1.0, 1.0, 2.0, 1.0)):
            caller.submit(str(number), 5, SignalSpec("sampled", temperature))
        await caller.has(4)
    assert backend.batches == [["0", "1"], ["2"], ["3"]]


async def test_answers_not_taken_put_a_call_off_and_do_not_change_it() -> None:
    backend = Recorder()
    async with scheduling(backend, max_inflight_bytes=80) as scheduler:
        caller = Caller(scheduler)
        caller.takes = False
        for number in range(8):
            caller.submit(str(number), 5, answer_bytes=15)
        for taken in range(3):
            await caller.has(4)
            await asyncio.sleep(0.05)
            assert len(backend.batches) == (2 if taken < 2 else 3), "half of 80 bytes must fit beside those that wait"
            scheduler.release(caller.call, 15)
        scheduler.release(caller.call, 15)
        await caller.has(8)
    assert backend.batches == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"]]


async def test_clients_take_turns_and_one_that_has_no_place_is_first_next_time() -> None:
    backend = Recorder(delay=0.02)
    async with scheduling(backend, batch_tokens=20) as scheduler:
        greedy, modest, other = Caller(scheduler), Caller(scheduler), Caller(scheduler)
        for number in range(8):
            greedy.submit(f"g{number}", 5)
        modest.submit("m0", 5)
        modest.submit("m1", 12)
        other.submit("o0", 5, SignalSpec("topk", 1.0, 4))
        await asyncio.gather(greedy.has(8), modest.has(2), other.has(1))
    assert backend.batches[0] == ["g0", "m0", "g1", "g2"]
    assert backend.batches[1] == ["o0"], "nothing was done for it so far"
    assert backend.batches[2] == ["m1", "g3"]
    assert [name for batch in backend.batches for name in batch if name[0] == "g"] == [f"g{number}" for number in range(8)]


class CountingClock:
    """Seconds that pass as the model works, one for every 100 tokens, whatever the machine does meanwhile."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Timed(Recorder):
    """A model that takes its time by a clock of its own; notes when every rollout was done."""

    def __init__(self, clock: CountingClock) -> None:
        super().__init__()
        self.clock = clock
        self.done: dict[str, float] = {}

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        self.clock.now += sum(len(rollout.all_ids) for rollout in rollouts) / 100
        self.done.update({rollout.rollout_id: self.clock.now for rollout in rollouts})
        return super().score(rollouts, want)


async def test_ten_thousand_rollouts_do_not_keep_three_waiting() -> None:
    clock = CountingClock()
    backend = Timed(clock)
    async with scheduling(backend, batch_tokens=1000, clock=clock) as scheduler:
        greedy, modest = Caller(scheduler), Caller(scheduler)
        for number in range(10_000):
            greedy.submit(f"g{number}", 50)
        await greedy.has(100)
        came_at = clock.now
        for number in range(3):
            modest.submit(f"m{number}", 50)
        await modest.has(3)
        waited = max(backend.done[f"m{number}"] for number in range(3)) - came_at
        assert waited <= 2 * 1000 / 100, f"two batches at most, not {waited} s of the 5,000 that the other one needs"
        assert len(greedy.answers) < 1000


async def test_clients_get_the_same_tokens_however_many_and_long_their_rollouts_and_calls() -> None:
    clock = CountingClock()
    backend = Timed(clock)
    async with scheduling(backend, batch_tokens=400, clock=clock) as scheduler:
        many = Client("many calls", ClientLimits())
        callers = {"short": [Caller(scheduler)], "long": [Caller(scheduler)], "many": [Caller(scheduler, many) for _ in range(5)]}
        sizes = {"short": 10, "long": 130, "many": 25}
        for name, calls in callers.items():
            for number in range(30_000 // sizes[name]):
                calls[number % len(calls)].submit(f"{name} {number}", sizes[name])
        await callers["short"][0].has(1000)  # a third of its work; all three are busy until then
        by_then = {name: sum(sizes[name] for call in calls for _ in call.answers) for name, calls in callers.items()}
        assert max(by_then.values()) - min(by_then.values()) <= 2 * 400, by_then
        shares = [len(call.answers) for call in callers["many"]]
        assert max(shares) - min(shares) <= 2 * 400 // 25, "the calls of one client take turns"


async def test_who_was_away_has_saved_nothing_up() -> None:
    clock = CountingClock()
    backend = Timed(clock)
    async with scheduling(backend, batch_tokens=100, clock=clock) as scheduler:
        steady, late = Caller(scheduler), Caller(scheduler)
        for number in range(2000):
            steady.submit(f"s{number}", 10)
        await steady.has(500)
        for number in range(500):
            late.submit(f"l{number}", 10)
        before = len(steady.answers)
        await late.has(200)
        assert len(steady.answers) - before >= 150, "half of the model's time from now on, not all of it"


async def test_what_a_call_waits_for_goes_with_it() -> None:
    backend = Recorder(delay=0.05)
    async with scheduling(backend, batch_tokens=100) as scheduler:
        gone, here = Caller(scheduler), Caller(scheduler)
        for number in range(50):
            gone.submit(f"g{number}", 50)
        while not backend.batches:
            await asyncio.sleep(0.005)
        scheduler.close_call(gone.call)
        here.submit("h", 50)
        await here.has(1)
        assert backend.batches[1:] == [["h"]]
        assert gone.client.pending_bytes == 0


async def test_one_call_that_takes_nothing_does_not_stop_the_others_of_its_client() -> None:
    backend = Recorder()
    async with scheduling(backend, batch_tokens=20, max_inflight_bytes=80) as scheduler:
        stalled = Caller(scheduler)
        stalled.takes = False
        lively = Caller(scheduler, stalled.client)
        for number in range(20):
            stalled.submit(f"s{number}", 5, answer_bytes=20)
            lively.submit(f"l{number}", 5, answer_bytes=20)
        await lively.has(20)
        assert stalled.client.pending_bytes <= 80
        assert len(stalled.answers) <= 4


async def test_answers_that_share_a_batch_do_not_share_memory() -> None:
    class Packed(FakeBackend):
        def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
            together = np.full(sum(map(len, rollouts)), -1.0, np.float32)
            bounds = np.cumsum([0, *map(len, rollouts)])
            return [TeacherSignal("sampled", 1.0, sampled=together[start:stop]) for start, stop in itertools.pairwise(bounds)]

    async with scheduling(Packed(VOCAB)) as scheduler:
        one, other = Caller(scheduler), Caller(scheduler)
        one.submit("a", 10)
        other.submit("b", 10)
        await asyncio.gather(one.has(1), other.has(1))
        for answer in (one.answers["a"], other.answers["b"]):
            assert isinstance(answer, TeacherSignal)
            assert answer.sampled is not None
            assert answer.sampled.base is None, "a slow client keeps its own rows alone"


async def test_a_model_that_gives_something_else_fails_that_item_alone(caplog: pytest.LogCaptureFixture) -> None:
    async with scheduling(Recorder(odd={"1": None})) as scheduler:
        caller = Caller(scheduler)
        for number in range(3):
            caller.submit(str(number), 5)
        await caller.has(3)
        refused = caller.answers["1"]
        assert isinstance(refused, RefusedError)
        assert (refused.code, refused.is_retryable) == ("internal", True)
        assert [isinstance(caller.answers[name], TeacherSignal) for name in "02"] == [True, True]
        caller.submit("3", 5)
        await caller.has(4)
    assert "rollout 1 failed" in caplog.text


async def test_an_answer_that_cannot_be_handed_over_is_refused_and_the_next_ones_come(caplog: pytest.LogCaptureFixture) -> None:
    refused: list[Answer] = []

    def deliver(answer: Answer) -> None:
        if isinstance(answer, TeacherSignal):
            raise KeyError("no such client")
        refused.append(answer)

    def never(answer: Answer) -> None:
        raise KeyError("nor this one")

    async with scheduling(Recorder()) as scheduler:
        caller = Caller(scheduler)
        for take in (deliver, never):
            scheduler.submit(caller.call, Job(SAMPLED, Rollout("bad", Prompt("p", (1,)), (2, 3)), 3, 0, take))
        caller.submit("good", 5)
        await caller.has(1)
        caller.submit("later", 5)
        await caller.has(2)
        assert all(isinstance(answer, TeacherSignal) for answer in caller.answers.values())
    (only,) = refused
    assert isinstance(only, RefusedError)
    assert (only.code, str(only)) == ("internal", "rollout bad: KeyError: 'no such client'")
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 3
    assert "rollout bad stays without an answer" in caplog.text
