"""Stages of a run that only take time: an engine, a teacher and a trainer with durations, and what else a loop needs around them.

A token here stands for many: nothing is computed from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from bbopd.data.rejected import Rejection
from bbopd.trainer.step import Gradients, StepMetrics, StepTokens
from bbopd.types import DistillBatch, Offer, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["Durations", "Lengths", "Lines", "OpenGate", "Quiet", "Stream", "TimedEngine", "TimedTeacher", "TimedTrainer"]

Lengths = Callable[[np.random.Generator, int], int]
_REFERENCE_TOKENS = 16


@dataclass(frozen=True)
class Durations:
    """Seconds. ``token`` is of one sequence of the engine, ``trained_token`` of the trainer."""

    token: float = 0.1
    slots: int = 256  # sequences written side by side
    trained_token: float = 0.001
    step: float = 0.0  # of the trainer, besides its tokens
    push: float = 0.0
    teacher: Callable[[np.random.Generator], float] = lambda random: 0.0  # of one answer
    teacher_places: int = 1_000_000  # answers side by side
    lost: Callable[[np.random.Generator, float], float] = lambda random, seconds: 0.0  # of a sequence of so many: begun again
    jitter: Callable[[np.random.Generator], float] = lambda random: 1.0  # what the trainer's tokens take of their seconds


class TimedEngine:
    """Writes answers of 1 to ``max_new_tokens`` tokens, ``slots`` at a time. As vLLM's, its push waits for what is being written and holds
    new ones back. ``lengths`` draws the tokens of an answer from a generator and the most that it may have."""

    def __init__(self, durations: Durations, lengths: Lengths) -> None:
        self._durations, self._lengths = durations, lengths
        self._slots = asyncio.Semaphore(durations.slots)
        self._writing = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._open = asyncio.Event()
        self._open.set()
        self.versions: list[int] = []
        self.written = 0
        self.busy_slot_seconds = 0.0

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        done: asyncio.Queue[Rollout | None] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        async def feed() -> None:
            draw = 0
            async for prompt in prompts:
                await self._slots.acquire()
                await self._open.wait()
                self._writing += 1
                self._idle.clear()
                tasks.append(asyncio.create_task(self._write(prompt, draw, sampling, done)))
                draw += 1
            await asyncio.gather(*tasks)
            done.put_nowait(None)

        feeding = asyncio.create_task(feed())
        try:
            while (rollout := await done.get()) is not None:
                self.written += 1
                yield rollout
        finally:
            await _cancel(feeding, *tasks)

    def version_of(self, draw: int) -> int:
        """Of the weights that the answer ``draw`` of a call is written with."""
        return self.versions[-1]

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self._open.clear()
        await self._idle.wait()
        await asyncio.sleep(self._durations.push)
        self.versions.append(version)
        self._open.set()

    async def _write(self, prompt: Prompt, draw: int, sampling: Sampling, done: asyncio.Queue[Rollout | None]) -> None:
        random = np.random.default_rng([sampling.seed, draw])
        length = self._lengths(random, sampling.max_new_tokens)
        version = self.version_of(draw)
        seconds = length * self._durations.token
        seconds += self._durations.lost(random, seconds)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._slots.release()
            self._writing -= 1
            if not self._writing:
                self._idle.set()
        self.busy_slot_seconds += seconds
        logprobs = np.full(length, -1.0, np.float32)
        done.put_nowait(Rollout(f"{prompt.prompt_id}#{draw}", prompt, (1,) * length, logprobs=logprobs, weights_version=version, draw=draw))


class TimedTeacher:
    """Answers each sequence after its own time, ``teacher_places`` at once, in the order they are ready."""

    info = TeacherInfo("timed", 8, (Offer("sampled"),))

    def __init__(self, durations: Durations) -> None:
        self._durations = durations
        self._random = np.random.default_rng(1)
        self._places = asyncio.Semaphore(durations.teacher_places)
        self.scored = 0

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        done: asyncio.Queue[ScoredRollout | None] = asyncio.Queue()
        tasks: list[asyncio.Task[None]] = []

        async def answer(rollout: Rollout) -> None:
            async with self._places:
                await asyncio.sleep(self._durations.teacher(self._random))
            done.put_nowait(ScoredRollout(rollout, TeacherSignal("sampled", sampled=np.full(len(rollout), -1.0, np.float32))))

        async def feed() -> None:
            async for rollout in rollouts:
                tasks.append(asyncio.create_task(answer(rollout)))
            await asyncio.gather(*tasks)
            done.put_nowait(None)

        feeding = asyncio.create_task(feed())
        try:
            while (scored := await done.get()) is not None:
                self.scored += 1
                yield scored
        finally:
            await _cancel(feeding, *tasks)

    def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Any]:
        raise NotImplementedError


class TimedTrainer:
    """Remembers how many tokens each step had. `Simulation` takes the time that `seconds_of` says."""

    planned_steps = 1

    def __init__(self, durations: Durations, *, steps_done: int = 0) -> None:
        self._durations = durations
        self._random = np.random.default_rng(2)
        self.steps_done = steps_done
        self.tokens: list[int] = []

    def accumulate(self, micro_batches: Sequence[DistillBatch]) -> Gradients:
        return Gradients(StepTokens.of(micro_batches), {}, {}, 0.5, 0.5, loss=1.0, grad_norm=1.0)

    def update(self, gradients: Gradients) -> StepMetrics:
        self.steps_done += 1
        tokens = gradients.tokens
        self.tokens.append(tokens.tokens)
        return StepMetrics(
            step=self.steps_done,
            loss=gradients.loss,
            ce=1.0,
            kd=1.0,
            lr=1e-3,
            grad_norm=gradients.grad_norm,
            ce_weight=gradients.ce_weight,
            kd_weight=gradients.kd_weight,
            **asdict(tokens),
            seconds=gradients.seconds,
            teacher_tail_mass=None,
            floored=0,
        )

    def drop(self) -> None:
        """Nothing was accumulated."""

    def seconds_of(self, tokens: int) -> float:
        return self._durations.step + tokens * self._durations.trained_token * self._durations.jitter(self._random)

    def weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Any]]:
        yield from ()


@dataclass
class Stream:
    """Prompts without end, the labelled ones with so many tokens of a continuation."""

    reference_tokens: int = _REFERENCE_TOKENS
    position: dict[str, int] = field(default_factory=lambda: {"prompts": 0, "labelled": 0})

    def next_prompts(self, count: int) -> list[Prompt]:
        return [Prompt(f"p{number}", (1,)) for number in self._take("prompts", count)]

    def next_labelled(self, count: int) -> list[Prompt]:
        return [Prompt(f"l{number}", (1,), (1,) * self.reference_tokens) for number in self._take("labelled", count)]

    def _take(self, name: str, count: int) -> range:
        start = self.position[name]
        self.position = {**self.position, name: start + count}
        return range(start, start + count)


class OpenGate:
    """Rejects what ``turns_away`` says, and counts."""

    def __init__(self, turns_away: Callable[[Rollout], bool] = lambda rollout: False, counts: Mapping[str, int] | None = None) -> None:
        self._turns_away = turns_away
        self.counts: dict[str, int] = dict(counts or {})

    def begin_cycle(self) -> None:
        pass

    def accepts(self, rollout: Rollout) -> bool:
        if self._turns_away(rollout):
            self.reject(rollout, Rejection("turned_away"))
            return False
        return True

    def reject(self, rollout: Rollout, rejection: Rejection) -> None:
        self.counts[rejection.reason] = self.counts.get(rejection.reason, 0) + 1


class Lines:
    """The metrics of a run, in memory."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.last_trace: Mapping[str, Any] = {}

    def step(self, line: Mapping[str, Any]) -> None:
        self.steps.append(dict(line))

    def evaluation(self, line: Mapping[str, Any]) -> None:
        pass

    def trace(self, content: Mapping[str, Any]) -> None:
        self.last_trace = content

    def roll_back(self, step: int) -> None:
        self.steps = [line for line in self.steps if line["step"] <= step]

    def has_evaluation(self, stage: str, step: int) -> bool:
        return stage != "step"


class Quiet:
    def activity(self, name: str, detail: str = "") -> None:
        pass

    def advance(self, metrics: Mapping[str, Any], budget: Any) -> None:
        pass

    def evaluated(self, result: Mapping[str, Any]) -> None:
        pass

    def note(self, text: str) -> None:
        pass


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
