"""A run of the real loop over stages that only take time, on a virtual clock: hours of it pass in seconds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from bbopd.config import RunConfig
from bbopd.pipeline.loop import Loop
from bbopd.pipeline.parts import Parts, Scores
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Timeline
from bbopd.planning.stages import Lines, OpenGate, Quiet, Stream, TimedEngine, TimedTrainer
from bbopd.trainer.step import Gradients
from bbopd.types import SignalSpec

__all__ = ["Simulation"]


class Simulation:
    """Its stages and the loop over them. `run` in a virtual loop; then ``state``, ``lines``, ``saved`` say what it came to.

    Parameters
    ----------
    teacher
        Or what stands in its place, asked for ``want``.
    by_group
        Whether answers to one prompt go to it together.
    """

    def __init__(
        self,
        config: RunConfig,
        *,
        engine: TimedEngine,
        teacher: Scores,
        trainer: TimedTrainer,
        want: SignalSpec,
        state: RunState,
        prompts: Stream | None = None,
        gate: OpenGate | None = None,
        by_group: bool = False,
    ) -> None:
        self.config, self.want, self.state, self.by_group = config, want, state, by_group
        self.engine, self.teacher, self.trainer = engine, teacher, trainer
        self.prompts = prompts or Stream()
        self.lines = Lines()
        self.saved: list[RunState] = []
        self.stop = asyncio.Event()
        self.gate = gate or OpenGate(counts=state.rejected)
        self.evaluations: list[tuple[str, int, int]] = []
        self.seconds = 0.0

    async def run(self) -> str:
        async def blocking(call: Callable[..., Any], /, *arguments: Any) -> Any:
            result = call(*arguments)
            if isinstance(result, Gradients):  # they take the time, the update none
                await asyncio.sleep(self.trainer.seconds_of(result.tokens.tokens))
            return result

        async def evaluate(stage: str, step: int) -> Mapping[str, Any]:
            self.evaluations.append((stage, step, self.engine.versions[-1]))
            return {}

        clock = asyncio.get_running_loop().time
        self.timeline = Timeline(clock)
        parts = Parts(
            trainer=self.trainer,
            engine=self.engine,
            prompts=self.prompts,
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
