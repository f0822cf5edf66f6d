"""The run: cold start, then update cycles until the token budget is spent.

    draw -> sample -> filter -> score -> assemble -> train -> (weights back to the engine) -> draw ...

State is saved between cycles only: a cycle that was cut off is drawn again from the same position with the same seed, so a
resumed run repeats an uninterrupted one. A stop request is heard while sampling and scoring (the cycle is dropped) and
between cycles; a cycle whose training has begun is finished first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from bbopd.config import RunConfig
from bbopd.data.assemble import Item, assemble, rollout_of, split_into_steps
from bbopd.errors import ModelError, TrainingError
from bbopd.pipeline.cycle import CycleItems, collect_cycle
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.progress import Budget, Progress
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Activity, Timeline
from bbopd.teachers.budget import Spending
from bbopd.trainer.step import Trainer
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling, SignalSpec, Teacher

Evaluate = Callable[[str, int], Awaitable[Mapping[str, Any]]]
_LARGE_TAIL = 0.2  # share of a top-k teacher's mass outside its ids
_PATIENCE = 8  # cycles in a row without one accepted rollout before the run is given up


class Prompts(Protocol):
    """Where a loop draws from; ``position`` is all its state."""

    position: dict[str, int]

    def next_prompts(self, count: int) -> list[Prompt]: ...
    def next_labelled(self, count: int) -> list[Prompt]: ...


class Gate(Protocol):
    """What decides on a finished rollout."""

    def begin_cycle(self) -> None: ...
    def accepts(self, rollout: Rollout) -> bool: ...
    @property
    def counts(self) -> Mapping[str, int]: ...


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a loop turns; built by `session.open_session`, or from fakes in a test."""

    trainer: Trainer
    engine: RolloutEngine
    prompts: Prompts
    gate: Gate
    teacher: Teacher | None
    want: SignalSpec | None
    save: Callable[[RunState], None]
    agreement: Callable[[Iterable[Rollout], int], Mapping[str, float]] | None = None  # of an engine with weights of its own
    spending: Callable[[], Spending] | None = None  # of a teacher that costs money
    cache_counts: Mapping[str, int] | None = None  # of one whose answers are kept: hits, misses and more, in this session


class Loop:
    """Turns ``parts`` until the budgets of ``config`` are spent or ``stop`` is set."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        state: RunState,
        *,
        metrics: RunMetrics,
        timeline: Timeline,
        progress: Progress,
        evaluate: Evaluate,
        stop: asyncio.Event,
    ) -> None:
        self._config = config
        self._parts = parts
        self.state = state
        self._metrics = metrics
        self._timeline = timeline
        self._progress = progress
        self._evaluate = evaluate
        self._stop = stop
        self._saved_step = state.step
        self._pushed_step: int | None = None
        self._engine_figures: dict[str, float] = {}
        self._fruitless_cycles = 0
        self._has_warned_of_tail = False

    async def run(self) -> Literal["finished", "stopped"]:
        """Returns "stopped" after a stop request, with a checkpoint written. Raises `BbopdError` with what was finished kept."""
        try:
            return await self._run()
        except _StopRequestedError:
            self._save()
            return "stopped"

    async def _run(self) -> Literal["finished", "stopped"]:
        await self._evaluate_once("start")
        while not self._cold_start_is_over():
            await self._turn("cold_start")
        if self._config.train.cold_start_tokens and not self.state.on_policy_tokens and not self.state.labelled_tokens:
            self._save()
            await self._evaluate_once("cold_start")
        phase = "on_policy" if self._config.writes_rollouts else "labelled"
        while not self._budget_is_spent():
            await self._turn(phase)
        self._save()
        await self._evaluate_once("end")
        return "finished"

    # ------------------------------------------------------------ one cycle

    async def _turn(self, phase: str) -> None:
        self._parts.trainer.planned_steps = self._projected_steps()
        with self._kept_on_failure():
            cycle = await self._until_stopped(lambda: self._collect(phase))
        self._check_fruit(cycle)
        before_step = self.state.step
        try:
            self._train(phase, cycle)
        except TrainingError:
            self._save()  # the bad update was not applied, and drawing has moved on: going on skips what made it
            raise
        train, every = self._config.train, self._config.eval.every
        if self.state.step - self._saved_step >= train.checkpoint_every:
            self._save()
        if every and self.state.step // every > before_step // every and not self._budget_is_spent():
            with self._kept_on_failure():
                await self._evaluate_once("step")

    @contextmanager
    def _kept_on_failure(self) -> Iterator[None]:
        """Save before an error leaves a place where nothing of a cycle has been trained, unless the student itself has gone wrong."""
        try:
            yield
        except (ModelError, _StopRequestedError):
            raise
        except Exception:
            self._save()
            raise

    async def _collect(self, phase: str) -> CycleItems:
        config, state = self._config, self.state
        rollouts = config.rollouts_per_cycle if phase == "on_policy" else 0
        self._engine_figures = {}
        if rollouts:
            await self._push_weights()
        labelled = config.rollouts.per_update - rollouts
        prompts = self._parts.prompts
        prompts.position = state.position or prompts.position  # a cycle that was dropped is drawn again
        rollout_prompts = self._draw_rollout_prompts(rollouts)
        labelled_prompts = prompts.next_labelled(labelled)
        sampling = Sampling(
            max_new_tokens=config.rollouts.max_new_tokens,
            temperature=config.rollouts.temperature,
            top_p=config.rollouts.top_p,
            top_k=config.rollouts.top_k,
            seed=config.train.seed * 1_000_003 + state.cycle,
        )
        self._parts.gate.begin_cycle()
        switch = _Switch(self._timeline, self._progress)
        try:
            cycle = await collect_cycle(
                rollout_prompts,
                labelled_prompts,
                engine=self._parts.engine,
                teacher=self._parts.teacher,
                want=self._parts.want,
                sampling=sampling,
                accept=self._parts.gate.accepts,
                stream=config.rollouts.max_staleness > 0,
                timeline=self._timeline,
                on_activity=switch.to,
            )
        finally:
            switch.end()
        if self._parts.agreement is not None:
            with self._activity("sampling", span="agreement"):
                self._engine_figures |= self._parts.agreement(map(rollout_of, cycle.items), state.step)
        state.position = prompts.position
        state.cycle += 1
        state.sampled_tokens += cycle.sampled_tokens
        state.scored_tokens += cycle.scored_tokens
        state.rejected = dict(self._parts.gate.counts)
        return cycle

    async def _push_weights(self) -> None:
        """Give the engine the weights as they are now, unless it has them: just before it writes, so that a cold start pushes none."""
        if self._pushed_step == self.state.step:
            return
        with self._activity("sampling", span="push of weights", version=self.state.step):
            started = self._timeline.clock()
            await self._parts.engine.load_weights(self._parts.trainer.weights(), self.state.step)
            self._engine_figures["push_seconds"] = round(self._timeline.clock() - started, 4)
        self._pushed_step = self.state.step

    def _draw_rollout_prompts(self, rollouts: int) -> list[Prompt]:
        """``rollouts`` prompts to answer, each prompt ``samples_per_prompt`` times in a row (the last one fewer where it must)."""
        samples = self._config.rollouts.samples_per_prompt
        distinct = -(-rollouts // samples)
        prompts = self._parts.prompts.next_prompts(distinct)
        return [prompt for prompt in prompts for _ in range(samples)][:rollouts]

    def _check_fruit(self, cycle: CycleItems) -> None:
        if not cycle.drawn_rollouts or cycle.accepted:
            self._fruitless_cycles = 0
            return
        self._fruitless_cycles += 1
        if self._fruitless_cycles >= _PATIENCE:
            self._save()
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.state.rejected.items()))
            raise TrainingError(
                f"no rollout passed the filters in {_PATIENCE} cycles (rejected so far: {reasons}): the student may write gibberish; "
                "raise train.cold_start_tokens, loosen data.filters, or look into rejected.jsonl"
            )

    def _train(self, phase: str, cycle: CycleItems) -> None:
        train = self._config.train
        steps = split_into_steps(cycle.items, train.batch_tokens, train.micro_batch_tokens, train.max_seq_len)
        for micro_items in steps:
            with self._activity("training", step=self.state.step + 1, cycle=self.state.cycle, tokens=_response_tokens(micro_items)):
                metrics = self._parts.trainer.train_step([assemble(items, self._parts.want) for items in micro_items])
            state = self.state
            state.step = metrics.step
            state.trained_tokens += metrics.tokens
            state.on_policy_tokens += metrics.rollout_tokens
            if phase == "cold_start":
                state.cold_start_steps += 1
                state.cold_start_tokens += metrics.labelled_tokens
            else:
                state.labelled_tokens += metrics.labelled_tokens
            line = {
                "phase": phase,
                **asdict(metrics),
                "cycle": state.cycle,
                "on_policy_tokens": state.on_policy_tokens,
                "trained_tokens": state.trained_tokens,
                "elapsed": round(self._timeline.elapsed, 3),
                **self._engine_figures,
                **self._cost(),
            }
            self._metrics.step(line)
            self._progress.advance(line, self._budget(phase))
            self._warn_of_tail(metrics.teacher_tail_mass)
            if self._steps_are_spent():
                return

    def _cost(self) -> dict[str, float]:
        counts = self._parts.cache_counts or {}
        figures: dict[str, float] = {f"cache_{name}": counts[name] for name in ("hits", "misses") if name in counts}
        if self._parts.spending is not None:
            figures["teacher_cost"] = round(self._parts.spending().total, 9)
        return figures

    # ------------------------------------------------------------ budgets, saving, evaluation

    def _cold_start_is_over(self) -> bool:
        return self.state.cold_start_tokens >= self._config.train.cold_start_tokens or self._steps_are_spent()

    def _steps_are_spent(self) -> bool:
        return self._config.train.total_steps is not None and self.state.step >= self._config.train.total_steps

    def _budget_is_spent(self) -> bool:
        train, state = self._config.train, self.state
        if self._steps_are_spent():
            return True
        if self._config.writes_rollouts:
            return state.on_policy_tokens >= train.on_policy_tokens
        return train.labelled_tokens is not None and state.labelled_tokens >= train.labelled_tokens

    def _projected_steps(self) -> int:
        """Length of the run for the schedules: what was planned, or more where answers turn out shorter than they may be."""
        planned, train, state = self._config.planned_steps, self._config.train, self.state
        if not state.on_policy_tokens:
            return planned
        steps_per_token = (state.step - state.cold_start_steps) / state.on_policy_tokens
        projected = round(state.cold_start_steps + train.on_policy_tokens * steps_per_token)
        return max(planned, min(projected, train.total_steps or projected))

    def _warn_of_tail(self, tail_mass: float | None) -> None:
        if tail_mass is not None and tail_mass > _LARGE_TAIL and not self._has_warned_of_tail:
            self._has_warned_of_tail = True
            self._progress.note(
                f"the teacher's {self._config.teacher.topk} ids leave {tail_mass:.0%} of its mass in the tail, where the student "
                "learns only the total: raise teacher.topk, lower objective.temperature, or set teacher.signal=full"
            )

    def _budget(self, phase: str) -> Budget:
        train, state = self._config.train, self.state
        done, total = {
            "cold_start": (state.cold_start_tokens, train.cold_start_tokens),
            "on_policy": (state.on_policy_tokens, train.on_policy_tokens),
            "labelled": (state.labelled_tokens, train.labelled_tokens or 0),
        }[phase]
        return Budget(phase, done, total, state.step, self._config.planned_steps, self._timeline.elapsed)

    def _save(self) -> None:
        if self.state.step == self._saved_step:
            return
        with self._activity("saving"):
            self.state.seconds = self._timeline.seconds()
            self.state.busy_seconds = self._timeline.busy_seconds()
            self._parts.save(self.state)
        self._metrics.trace(self._timeline.to_json())
        self._saved_step = self.state.step

    async def _evaluate_once(self, stage: str) -> None:
        if self._metrics.has_evaluation(stage, self.state.step):
            return
        await self._push_weights()
        with self._activity("evaluation"):
            result = await self._until_stopped(lambda: self._evaluate(stage, self.state.step))
        self._metrics.evaluation(result)
        self._progress.evaluated(result)

    async def _until_stopped(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Begin ``work`` and await it; a stop request cancels it and raises `_StopRequestedError`."""
        if self._stop.is_set():
            raise _StopRequestedError
        task = asyncio.ensure_future(work())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
                raise _StopRequestedError
            return task.result()
        finally:
            stopped.cancel()
            if not task.done():  # this coroutine itself was cancelled
                task.cancel()

    @contextmanager
    def _activity(self, name: str, **about: Any) -> Iterator[None]:
        self._progress.activity(name)
        with self._timeline.activity(name, **about):
            yield


class _Switch:
    """Moves the timeline from one activity to the next without nesting."""

    def __init__(self, timeline: Timeline, progress: Progress) -> None:
        self._timeline, self._progress = timeline, progress
        self._current: Activity | None = None

    def to(self, name: str) -> None:
        self.end()
        self._progress.activity(name)
        self._current = self._timeline.begin(name)

    def end(self) -> None:
        if self._current is not None:
            self._timeline.end(self._current)
            self._current = None


def _response_tokens(micro_items: Sequence[Sequence[Item]]) -> int:
    return sum(len(rollout_of(item)) for items in micro_items for item in items)


class _StopRequestedError(Exception):
    """A stop request was heard."""
