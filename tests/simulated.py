"""A run whose stages only take time, on a virtual clock (`bbopd.planning`): with faults at set places, for tests of the loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np

from bbopd.config import RunConfig
from bbopd.errors import EngineError, TeacherError, TrainingError
from bbopd.pipeline.parts import Scores
from bbopd.pipeline.rewards import GroupRewards
from bbopd.pipeline.state import RunState
from bbopd.planning import simulation
from bbopd.planning.stages import Durations, OpenGate, Stream, TimedEngine, TimedTeacher, TimedTrainer
from bbopd.planning.virtual_clock import run_virtually
from bbopd.trainer.step import Gradients, StepMetrics
from bbopd.types import Judge, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec

WANT = SignalSpec("sampled")


def heavy_tail(random: np.random.Generator) -> float:
    """50 ms to 5 s, Pareto with exponent 1: a mean of 0.23 s, and one answer in a hundred at 5 s."""
    return float(min(5.0, 0.05 * (1.0 + random.pareto(1.0))))


class FailingEngine(TimedEngine):
    """Fails instead of its answer number ``fail_at``; writes a draw with weights of as many pushes before as ``lags`` says of it."""

    def __init__(
        self, durations: Durations, lengths: Callable[[np.random.Generator, int], int], lags: Callable[[int], int], fail_at: int
    ) -> None:
        super().__init__(durations, lengths)
        self._lags, self._fail_at = lags, fail_at

    def version_of(self, draw: int) -> int:
        return self.versions[max(0, len(self.versions) - 1 - self._lags(draw))]

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        async with aclosing(super().generate(prompts, sampling)) as rollouts:
            async for rollout in rollouts:
                if self.written == self._fail_at:
                    raise EngineError("the engine was told to fail")
                yield rollout


class FailingTeacher(TimedTeacher):
    """Fails instead of its answer number ``fail_at``."""

    def __init__(self, durations: Durations, fail_at: int) -> None:
        super().__init__(durations)
        self._fail_at = fail_at

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        async with aclosing(super().score(rollouts, want)) as answers:
            async for scored in answers:
                if self.scored == self._fail_at:
                    raise TeacherError("the teacher was told to fail")
                yield scored


class FailingTrainer(TimedTrainer):
    """Fails at step ``fail_at``."""

    def __init__(self, durations: Durations, *, steps_done: int, fail_at: int) -> None:
        super().__init__(durations, steps_done=steps_done)
        self._fail_at = fail_at

    def update(self, gradients: Gradients) -> StepMetrics:
        if self.steps_done + 1 == self._fail_at:
            raise TrainingError("the trainer was told to fail")
        return super().update(gradients)


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


class Simulation(simulation.Simulation):
    """With what tests vary."""

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
        state = state or RunState()
        teacher: Scores = FailingTeacher(durations, teacher_fails_at) if judge is None else GroupRewards(judge)
        super().__init__(
            config,
            engine=FailingEngine(durations, lengths, lags, engine_fails_at),
            teacher=teacher,
            trainer=FailingTrainer(durations, steps_done=state.step, fail_at=trainer_fails_at),
            want=want if judge is None else SignalSpec("text"),
            state=state,
            gate=gate,
            by_group=judge is not None,
        )
        self.durations = durations


def simulate(config: RunConfig, durations: Durations, **keywords: Any) -> Simulation:
    """Run to the end on a clock of its own."""

    async def work() -> Simulation:
        simulated = Simulation(config, durations, **keywords)
        await simulated.run()
        return simulated

    return run_virtually(work())


__all__ = ["Durations", "OpenGate", "Simulation", "Stream", "TimedTeacher", "heavy_tail", "simulate", "simulated_config"]
