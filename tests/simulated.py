"""A run whose stages only take time, on a virtual clock: the loop is the real one, engine, teacher and trainer are fakes with durations.

A token here stands for many: nothing is computed from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bbopd.config import RunConfig
from bbopd.data.rejected import Rejection
from bbopd.errors import EngineError, TeacherError, TrainingError
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.parts import Parts, Scores
from bbopd.pipeline.rewards import GroupRewards
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Timeline
from bbopd.trainer.step import StepMetrics
from bbopd.types import DistillBatch, Judge, Offer, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, TeacherSignal
from tests.virtual_clock import run_virtually

WANT = SignalSpec("sampled")


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


def heavy_tail(random: np.random.Generator) -> float:
    """50 ms to 5 s, Pareto with exponent 1: a mean of 0.23 s, and one answer in a hundred at 5 s."""
    return float(min(5.0, 0.05 * (1.0 + random.pareto(1.0))))


class TimedEngine:
    """Writes answers of 1 to ``max_new_tokens`` tokens, ``slots`` at a time. As vLLM's, its push waits for what is being written and holds
    new ones back. What ``lags`` says of a draw is written with weights of that many pushes before."""

    def __init__(
        self, durations: Durations, *, lengths: Callable[[np.random.Generator, int], int], lags: Callable[[int], int], fail_at: int = -1
    ) -> None:
        self._durations, self._lengths, self._lags, self._fail_at = durations, lengths, lags, fail_at
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
                if self.written == self._fail_at:
                    raise EngineError("the engine was told to fail")
                yield rollout
        finally:
            await _cancel(feeding, *tasks)

    async def load_weights(self, weights: Iterable[tuple[str, Any]], version: int) -> None:
        self._open.clear()
        await self._idle.wait()
        await asyncio.sleep(self._durations.push)
        self.versions.append(version)
        self._open.set()

    async def _write(self, prompt: Prompt, draw: int, sampling: Sampling, done: asyncio.Queue[Rollout | None]) -> None:
        length = self._lengths(np.random.default_rng([sampling.seed, draw]), sampling.max_new_tokens)
        version = self.versions[max(0, len(self.versions) - 1 - self._lags(draw))]
        seconds = length * self._durations.token
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

    def __init__(self, durations: Durations, *, fail_at: int = -1) -> None:
        self._durations, self._fail_at = durations, fail_at
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
                if self.scored == self._fail_at:
                    raise TeacherError("the teacher was told to fail")
                yield scored
        finally:
            await _cancel(feeding, *tasks)

    def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Any]:
        raise NotImplementedError


class TimedTrainer:
    """Remembers how many tokens each step had. It takes its time in `in_virtual_time`."""

    planned_steps = 1

    def __init__(self, durations: Durations, *, steps_done: int = 0, fail_at: int = -1) -> None:
        self._durations, self._fail_at = durations, fail_at
        self.steps_done = steps_done
        self.tokens: list[int] = []

    def accumulate(self, micro_batches: Sequence[DistillBatch]) -> Sequence[DistillBatch]:
        return tuple(micro_batches)

    def update(self, micro_batches: Sequence[DistillBatch]) -> StepMetrics:
        if self.steps_done + 1 == self._fail_at:
            raise TrainingError("the trainer was told to fail")
        self.steps_done += 1
        tokens = sum(batch.response_tokens for batch in micro_batches)
        rollout_tokens = sum(batch.rollout_tokens for batch in micro_batches)
        self.tokens.append(tokens)
        return StepMetrics(
            self.steps_done,
            1.0,
            1.0,
            1.0,
            1e-3,
            1.0,
            0.5,
            0.5,
            tokens,
            tokens - rollout_tokens,
            tokens,
            rollout_tokens,
            tokens,
            0.0,
            None,
            0,
        )

    def seconds_of(self, tokens: int) -> float:
        return self._durations.step + tokens * self._durations.trained_token

    def weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Any]]:
        yield from ()


@dataclass
class Stream:
    """Prompts without end."""

    position: dict[str, int] = field(default_factory=lambda: {"prompts": 0, "labelled": 0})

    def next_prompts(self, count: int) -> list[Prompt]:
        return [Prompt(f"p{number}", (1,)) for number in self._take("prompts", count)]

    def next_labelled(self, count: int) -> list[Prompt]:
        return [Prompt(f"l{number}", (1,), (1,) * 16) for number in self._take("labelled", count)]

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


def any_length(random: np.random.Generator, longest: int) -> int:
    return int(random.integers(1, longest, endpoint=True))


def simulated_config(
    *, per_update: int, batch_tokens: int, steps: int, staleness: int, longest: int = 32, samples: int = 1, **train: Any
) -> RunConfig:
    return RunConfig.model_validate(
        {
            "student": {"model": "none"},
            "teacher": {"target": "grpc://localhost:1"},
            "rollouts": {
                "engine": "vllm",
                "per_update": per_update,
                "samples_per_prompt": samples,
                "max_new_tokens": longest,
                "on_policy_fraction": train.pop("on_policy_fraction", 1.0),
                "max_staleness": staleness,
            },
            "objective": {"ramp": 0, "temperature": 1.0, "alpha": 0.0 if "on_policy_fraction" not in train else 0.5},
            "train": {
                "batch_tokens": batch_tokens,
                "micro_batch_tokens": 1_000_000,
                "on_policy_tokens": 1_000_000_000,
                "total_steps": steps,
                "checkpoint_every": 50,
                "warmup": 0,
                **train,
            },
            "output": "/nowhere",
        }
    )


class Simulation:
    """A run of the real loop over timed fakes. `run` in a virtual loop; then ``state``, ``lines``, ``saved`` say what it came to."""

    def __init__(
        self,
        config: RunConfig,
        durations: Durations,
        *,
        state: RunState | None = None,
        lengths: Callable[[np.random.Generator, int], int] = any_length,
        gate: OpenGate | None = None,
        lags: Callable[[int], int] = lambda draw: 0,
        engine_fails_at: int = -1,
        teacher_fails_at: int = -1,
        trainer_fails_at: int = -1,
        judge: Judge | None = None,
        want: SignalSpec = WANT,
    ) -> None:
        self.config, self.durations = config, durations
        self.state = state or RunState()
        self.lines = Lines()
        self.saved: list[RunState] = []
        self.stop = asyncio.Event()
        self.engine = TimedEngine(durations, lengths=lengths, lags=lags, fail_at=engine_fails_at)
        self.by_group = judge is not None
        self.want = SignalSpec("text") if self.by_group else want
        self.teacher: Scores = TimedTeacher(durations, fail_at=teacher_fails_at) if judge is None else GroupRewards(judge)
        self.trainer = TimedTrainer(durations, steps_done=self.state.step, fail_at=trainer_fails_at)
        self.gate = gate or OpenGate(counts=self.state.rejected)
        self.evaluations: list[tuple[str, int, int]] = []
        self.seconds = 0.0

    async def run(self) -> str:
        async def blocking(call: Callable[..., Any], /, *arguments: Any) -> Any:
            result = call(*arguments)
            if isinstance(result, tuple):  # of micro-batches: gradients take the time, the update none
                await asyncio.sleep(self.trainer.seconds_of(sum(batch.response_tokens for batch in result)))
            return result

        async def evaluate(stage: str, step: int) -> Mapping[str, Any]:
            self.evaluations.append((stage, step, self.engine.versions[-1]))
            return {}

        clock = asyncio.get_running_loop().time
        self.timeline = Timeline(clock)
        parts = Parts(
            trainer=self.trainer,
            engine=self.engine,
            prompts=Stream(),
            gate=self.gate,
            teacher=self.teacher,
            want=self.want,
            save=self.saved.append,
            by_group=self.by_group,
            overlaps=self.config.rollouts.max_staleness > 0,
            run_blocking=blocking,
        )
        loop = Loop(
            self.config,
            parts,
            self.state,
            metrics=self.lines,
            timeline=self.timeline,
            progress=Quiet(),
            evaluate=evaluate,
            stop=self.stop,
        )
        started = clock()
        try:
            return await loop.run()
        finally:
            self.seconds = clock() - started


def simulate(config: RunConfig, durations: Durations, **keywords: Any) -> Simulation:
    """Run to the end on a clock of its own."""

    async def work() -> Simulation:
        simulation = Simulation(config, durations, **keywords)
        await simulation.run()
        return simulation

    return run_virtually(work())


async def _cancel(*tasks: asyncio.Task[None]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


__all__ = ["Durations", "OpenGate", "Simulation", "Stream", "TimedTeacher", "heavy_tail", "simulate", "simulated_config"]
