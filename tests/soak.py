"""Rollouts scored for minutes by replicas that die, stall, reset and answer wrongly: ``python -m tests.soak SECONDS [SEED]``.

Two real servers, each behind a fault proxy, and a third that spoils every tenth of its answers. Faults come at random from a seed, all
replicas at once too. It ends with every rollout accounted for: answered once, every row compared with the truth; or it fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bbopd.teachers.fake import FakeBackend
from bbopd.types import Rollout, ScoredRollout, SignalSpec
from tests.fault_proxy import FaultProxy, proxied
from tests.fault_server import Answer, FaultyTeacher, change, serving, touch
from tests.faults import assert_nothing_lost, connected, make_rollouts
from tests.serve_fake import VOCAB, end_process, start_process
from tests.waiting import unused_port

WANTS = (SignalSpec("topk", 1.5, 8), SignalSpec("full"), SignalSpec("sampled"), SignalSpec("topk", 1.0, 64))
TIMEOUT = 30.0  # seconds without an answer after which the client gives up: no fault lasts as long
LONGEST_FAULT = 4.0  # seconds
PASS_ROLLOUTS = 300
BURST, PAUSE = 40, 1.0  # rollouts at once, then seconds without: light on the processor, and much in flight when something breaks
DELAY = 0.05  # seconds of a model's call, of 200 tokens
MEMORY_MIB = 48  # that the client may grow by after the first pass of each kind

SPOILS = (  # each is found by what it is; a lie within what a teacher may say could not be
    lambda answer: _values(answer, lambda values: values * np.float16(np.nan)),
    lambda answer: _values(answer, lambda values: values + np.float16(60)),
    touch(lambda chunk: setattr(chunk, "crc32", chunk.crc32 ^ 1)),
    touch(lambda chunk: setattr(chunk, "input_sha256", bytes(32))),
    touch(lambda chunk: setattr(chunk, "position", 1)),
    lambda answer: [*answer, *answer],
)


@dataclass(slots=True)
class Outcome:
    """What happened, counted."""

    seconds: float = 0.0
    passes: int = 0
    asked: int = 0
    answered: int = 0
    rows: int = 0
    longest_silence: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    client: Counter[str] = field(default_factory=Counter)
    memory_mib: list[float] = field(default_factory=list)

    def lines(self) -> list[str]:
        settled, last = self.memory_mib[min(len(WANTS), len(self.memory_mib)) - 1], self.memory_mib[-1]
        return [
            f"{self.seconds:.0f} s, {self.passes} passes: {self.asked} rollouts asked, {self.answered} answered, each once; "
            f"{self.rows} rows, all as computed directly",
            f"faults: {', '.join(f'{count} {name}' for name, count in sorted(self.faults.items()))}",
            f"client: {', '.join(f'{count} {name}' for name, count in sorted(self.client.items()))}",
            f"longest wait for an answer {self.longest_silence:.1f} s; client's memory: {settled:.0f} MiB after "
            f"{min(len(WANTS), self.passes)} passes, {last:.0f} MiB at the end",
        ]


class Replica:
    """A real server behind a proxy, and all that may befall it."""

    def __init__(self, seed: int, proxy: FaultProxy, process: subprocess.Popen[str], port: int, faults: Counter[str]) -> None:
        self.process = process
        self._port = port
        self._proxy = proxy
        self._random = random.Random(seed)
        self._faults = faults
        self._is_over = asyncio.Event()

    def end(self) -> None:
        """Let the fault that is on be the last, and soon over."""
        self._is_over.set()

    async def _for(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_over.wait(), seconds)

    async def suffer(self, may_die: bool) -> None:
        """One fault after the other, with quiet between them, until `end`."""
        kinds = [
            self.black_hole,
            self.delay,
            self.throttle,
            self.resets,
            self.network_down,
            *([self.ended, self.killed] if may_die else []),
        ]
        coming = kinds[-1:]
        while not self._is_over.is_set():
            await self._for(self._random.uniform(1.0, 6.0))
            coming = coming or self._random.sample(kinds, len(kinds))
            fault = coming.pop()
            self._faults[fault.__name__.replace("_", " ")] += 1
            await fault(self._random.uniform(0.2, LONGEST_FAULT))

    async def black_hole(self, seconds: float) -> None:
        self._proxy.is_black_hole = True
        await self._for(seconds)
        self._proxy.is_black_hole = False

    async def delay(self, seconds: float) -> None:
        self._proxy.delay = self._random.uniform(0.01, 0.3)
        await self._for(seconds)
        self._proxy.delay = 0.0

    async def throttle(self, seconds: float) -> None:
        self._proxy.bytes_per_second = self._random.uniform(2e3, 2e5)
        await self._for(seconds)
        self._proxy.bytes_per_second = 0.0

    async def resets(self, seconds: float) -> None:
        self._proxy.reset_after = self._random.randint(2_000, 60_000)
        await self._for(seconds)
        self._proxy.reset_after = 0

    async def network_down(self, seconds: float) -> None:
        await self._proxy.kill()
        await self._for(seconds)
        await self._proxy.start()

    async def killed(self, seconds: float) -> None:
        await self._restart(signal.SIGKILL, seconds)

    async def ended(self, seconds: float) -> None:
        await self._restart(signal.SIGTERM, seconds)

    async def _restart(self, how: signal.Signals, seconds: float) -> None:
        self.process.send_signal(how)
        await asyncio.to_thread(self.process.wait)
        end_process(self.process)
        await self._for(seconds)
        self.process, _ = await asyncio.to_thread(start_process, self._port, DELAY, 200)


async def soak(seconds: float, seed: int = 0) -> Outcome:
    """Keep going for ``seconds``. Raises `AssertionError` or `TeacherError` for whatever was lost, wrong, repeated or late."""
    outcome, numbers = Outcome(), random.Random(seed)
    backend = FakeBackend(VOCAB)
    async with contextlib.AsyncExitStack() as stack:
        replicas, ports = [], []
        for number in range(2):
            process, port = await asyncio.to_thread(start_process, unused_port(), DELAY, 200)
            proxy = await stack.enter_async_context(proxied(port, seed + number))
            replicas.append(Replica(seed + number, proxy, process, port, outcome.faults))
            ports.append(proxy.port)
            stack.callback(lambda replica: end_process(replica.process), replicas[-1])
        liar = FaultyTeacher(FakeBackend(VOCAB), spoil=_spoiling(numbers, outcome.faults), times=None)
        slow = await stack.enter_async_context(proxied(await stack.enter_async_context(serving(liar)), seed + 2))
        slow.delay = 0.2  # or it would answer most of them, being in this process
        ports.append(slow.port)
        teacher = await stack.enter_async_context(connected(*ports, timeout=TIMEOUT))
        weather = [asyncio.create_task(replica.suffer(may_die=number == 0)) for number, replica in enumerate(replicas)]
        try:
            start = time.monotonic()
            async with asyncio.timeout(seconds + 4 * TIMEOUT):  # nothing hangs
                async with asyncio.TaskGroup() as passes:
                    for number, want in enumerate(WANTS):
                        passes.create_task(_keep_asking(teacher, backend, want, start + seconds, random.Random(seed + number), outcome))
            outcome.seconds = time.monotonic() - start
        finally:
            for replica in replicas:
                replica.end()
            await asyncio.gather(*weather)
    outcome.client.update(teacher.counters)
    return outcome


async def _keep_asking(teacher, backend, want: SignalSpec, until: float, numbers: random.Random, outcome: Outcome) -> None:
    """Pass after pass of one level."""
    while time.monotonic() < until:
        rollouts = make_rollouts(PASS_ROLLOUTS, VOCAB, seed=numbers.randrange(2**32))
        await _one_pass(teacher, backend, rollouts, want, until, outcome)


async def _one_pass(teacher, backend, rollouts: list[Rollout], want: SignalSpec, until: float, outcome: Outcome) -> None:
    """Score until the rollouts, or the time, are at their end; then account for every one of them."""
    sent: list[Rollout] = []

    async def source() -> AsyncIterator[Rollout]:
        for rollout in rollouts:
            if time.monotonic() > until:
                return
            sent.append(rollout)
            yield rollout
            await asyncio.sleep(PAUSE if len(sent) % BURST == 0 else 0)

    scored: list[ScoredRollout] = []
    last = time.monotonic()
    async for answer in teacher.score(source(), want):
        now = time.monotonic()
        outcome.longest_silence = max(outcome.longest_silence, now - last)
        last = now
        scored.append(answer)
    assert_nothing_lost(backend, sent, scored, want)
    outcome.passes += 1
    outcome.asked += len(sent)
    outcome.answered += len(scored)
    outcome.rows += sum(len(answer.rollout) for answer in scored)
    outcome.memory_mib.append(_resident_mib())


def _values(answer: Answer, how: Callable[[np.ndarray], np.ndarray]) -> Answer:
    name = "logits" if answer[-1].chunk.HasField("logits") else "sampled"
    return change(name, lambda values: how(values).astype(values.dtype))(answer)


def _spoiling(numbers: random.Random, faults: Counter[str]):
    def spoil(answer: Answer) -> Answer:
        if numbers.random() > 0.1:
            return answer
        faults["bad answers"] += 1
        return numbers.choice(SPOILS)(answer) if numbers.random() > 0.05 else answer[:-1]  # or the last message never comes

    return spoil


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def check_outcome(outcome: Outcome) -> None:
    """Everything accounted for, every kind of trouble met, and memory that does not grow."""
    assert outcome.answered == outcome.asked > 0
    assert outcome.longest_silence < TIMEOUT
    assert outcome.client["reconnects"] > 0
    assert outcome.client["bad_answers"] > 0
    settled = outcome.memory_mib[min(len(WANTS), len(outcome.memory_mib)) - 1]
    assert outcome.memory_mib[-1] - settled < MEMORY_MIB


if __name__ == "__main__":
    done = asyncio.run(soak(float(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0))
    print("\n".join(done.lines()))
    check_outcome(done)
