"""The run: cold start, then update cycles until the token budget is spent.

    draw -> sample -> filter -> score -> assemble -> train -> (weights back to the engine) -> draw ...

Cycles take turns here, or overlap by one (`overlap`) where the engine has weights of its own and `rollouts.max_staleness` is 1.

With turns, state is saved between cycles only: a cycle that was cut off is drawn again from the same position with the same seed, so a
resumed run repeats an uninterrupted one. A stop request is heard while sampling and scoring (the cycle is dropped) and
between cycles; a cycle whose training has begun is finished first.

A bad update may send the run back to its last checkpoint (`bad_updates`): weights, moments and what counts updates are then as they were
there, and drawing goes on: what was under way is drawn again, and new prompts come in place of those that were trained since.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from copy import deepcopy
from typing import Any, Literal

from bbopd.config import RunConfig
from bbopd.data.assemble import rollout_of, split_into_steps
from bbopd.errors import DivergedError, ModelError, RankError, TrainingError
from bbopd.pipeline.bad_updates import Fault, RollBackError
from bbopd.pipeline.books import Books, Draw
from bbopd.pipeline.budgets import Budgets
from bbopd.pipeline.cycle import CycleItems, collect_cycle, sampling_of
from bbopd.pipeline.metrics import Recorder
from bbopd.pipeline.overlap import Overlap
from bbopd.pipeline.parts import Parts, to_the_end
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Timeline
from bbopd.pipeline.updates import Updates
from bbopd.pipeline.weights import Weights

Evaluate = Callable[[str, int], Awaitable[Mapping[str, Any]]]
_PATIENCE = 8  # cycles in a row without one accepted rollout before the run is given up


class Loop:
    """Turns ``parts`` until the budgets of ``config`` are spent or ``stop`` is set."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        state: RunState,
        *,
        metrics: Recorder,
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
        self._saved_step, self._saved_bad_updates = state.step, state.bad_updates
        self._budgets = Budgets(config, state)
        self._fruitless_cycles = 0

    async def run(self) -> Literal["finished", "stopped"]:
        """Returns "stopped" after a stop request, with a checkpoint written. Raises `BbopdError` with what was finished kept."""
        config, parts = self._config, self._parts
        self._books = Books(self.state, parts.prompts, parts.gate, samples_per_prompt=config.rollouts.samples_per_prompt)
        self._weights = Weights(parts, self._timeline)
        watchers: dict[str, Any] = {"metrics": self._metrics, "timeline": self._timeline, "progress": self._progress}
        self._updates = Updates(config, parts, self.state, self._books, **watchers)
        try:
            return await self._run()
        except _StopRequestedError:
            await self._save()
            return "stopped"

    async def _run(self) -> Literal["finished", "stopped"]:
        if self._config.train.rolls_back and not self._parts.is_saved:
            await self._write()
        await self._evaluate_once("start")
        while not self._budgets.cold_start_is_over():
            async with self._rolled_back_where_bad():
                await self._turn("cold_start")
        if self._config.train.cold_start_tokens and not self.state.on_policy_tokens and not self.state.labelled_tokens:
            await self._save()
            await self._evaluate_once("cold_start")
        phase = "on_policy" if self._config.writes_rollouts else "labelled"
        while not self._budgets.is_spent():
            async with self._rolled_back_where_bad():
                if self._parts.overlaps and phase == "on_policy":
                    await self._overlap()
                else:
                    await self._turn(phase)
        await self._save()
        await self._evaluate_once("end")
        return "finished"

    # ------------------------------------------------------------ one cycle, in turn

    async def _turn(self, phase: str) -> None:
        self._parts.trainer.planned_steps = self._budgets.projected_steps()
        async with self._kept_on_failure():
            draw, cycle = await self._until_stopped(lambda: self._collect(phase))
            self.check_fruit(cycle.drawn_rollouts, cycle.accepted)
        before_step = self.state.step
        try:
            await self._train(phase, draw, cycle)
        except DivergedError:
            raise
        except TrainingError:
            await self._save()  # the bad update was not applied, and its sequences are rejected: going on skips what made it
            raise
        if self._is_due_to_save():
            await self._save()
        if self._is_due_to_evaluate(before_step):
            async with self._kept_on_failure():
                await self._evaluate_once("step")

    async def _collect(self, phase: str) -> tuple[Draw, CycleItems]:
        config, state = self._config, self.state
        rollouts = self._budgets.rollouts_of_cycle() if phase == "on_policy" else 0
        self._weights.figures = {}
        opponent = self._parts.opponent
        if rollouts or opponent is not None:
            await self._push_weights()
        if opponent is not None:
            opponent.begin_cycle(state.cycle)
            if phase == "on_policy":
                opponent.end_warm_up()
        draw = self._books.draw(rollouts, config.rollouts.per_update - rollouts)
        self._parts.gate.begin_cycle()
        cycle = await collect_cycle(
            draw.rollouts,
            draw.labelled,
            engine=self._parts.engine,
            teacher=self._parts.teacher,
            want=self._parts.want,
            sampling=sampling_of(config, state.cycle),
            cycle=state.cycle,
            accept=self._parts.gate.accepts,
            reject=self._parts.gate.reject,
            choose=self._parts.with_candidates,
            write_labels=self._parts.with_labels,
            by_group=self._parts.by_group,
            stream=config.rollouts.max_staleness > 0,
            timeline=self._timeline,
            progress=self._progress,
        )
        if self._parts.agreement is not None:
            with self._activity("sampling", span="agreement"):
                self._weights.figures |= self._parts.agreement(map(rollout_of, cycle.items), state.step)
        if opponent is not None and phase == "cold_start":
            with self._activity("sampling", span="answers beside the teacher's"):
                cycle.sampled_tokens += await opponent.face(cycle.items, self._parts.engine, sampling_of(config, state.cycle))
        self._books.book(draw)
        kept = {rollout_of(item).draw for item in cycle.items}
        self._books.reject(draw.first + place for place in range(len(draw)) if place not in kept)
        state.sampled_tokens += cycle.sampled_tokens
        state.scored_tokens += cycle.scored_tokens
        return draw, cycle

    async def _train(self, phase: str, draw: Draw, cycle: CycleItems) -> None:
        train = self._config.train
        await self._weights.sleep()
        learned = await self._teach_opponent()
        if isinstance(learned, Fault):
            self._updates.leave_out(learned, cycle.items, [draw.first + rollout_of(item).draw for item in cycle.items])
            return
        figures = {**self._weights.figures, **learned}
        for micro_items in split_into_steps(cycle.items, train.batch_tokens, train.micro_batch_tokens, train.max_seq_len):
            numbers = [draw.first + rollout_of(item).draw for items in micro_items for item in items]
            await self._updates.step(phase, micro_items, numbers, self.state.cycle, figures)
            if self._budgets.steps_are_spent():
                return

    async def _teach_opponent(self) -> Mapping[str, float] | Fault:
        """One step of who learns beside the student, if anyone does; what it tells, or what is wrong with it."""
        opponent = self._parts.opponent
        if opponent is None:
            return {}
        try:
            with self._activity("training", span="discriminator"):
                learned, cancelled = await to_the_end(self._parts.run_blocking(opponent.learn))
        except TrainingError as error:
            return Fault("discriminator", f"update {self.state.step + 1}: {error}")
        if cancelled is not None:
            raise cancelled
        return learned

    # ------------------------------------------------------------ cycles that overlap

    async def _overlap(self) -> None:
        """Turn until the budget is spent, an evaluation is due, or the run shall stop; what is under way then stays pending."""
        before_step = self.state.step
        overlap = Overlap(
            self._config,
            self._parts,
            self.state,
            books=self._books,
            weights=self._weights,
            updates=self._updates,
            timeline=self._timeline,
            progress=self._progress,
            stop=self._stop,
            check_fruit=self.check_fruit,
            after_step=lambda: self._after_step(before_step),
        )
        async with self._kept_on_failure():
            await overlap.run()
        if self._stop.is_set():
            raise _StopRequestedError
        if self._is_due_to_evaluate(before_step):
            async with self._kept_on_failure():
                await self._evaluate_once("step")

    async def _after_step(self, before_step: int) -> bool:
        """Save where that is due; whether the pipeline shall run empty, for an evaluation of the weights as they then are."""
        if self._is_due_to_save():
            await self._save()
        return self._is_due_to_evaluate(before_step)

    # ------------------------------------------------------------ going back

    @asynccontextmanager
    async def _rolled_back_where_bad(self) -> AsyncIterator[None]:
        try:
            yield
        except RollBackError as error:
            await self._roll_back(str(error))

    async def _roll_back(self, why: str) -> None:
        state, roll_back = self.state, self._parts.roll_back
        assert roll_back is not None, "a run whose policy it is can"
        before = state.step
        with self._activity("loading", span="the last checkpoint"):
            saved, cancelled = await to_the_end(self._parts.run_blocking(roll_back))
        state.roll_back(saved)
        self._saved_step = state.step
        self._books.put_back()
        self._weights.forget()
        self._metrics.roll_back(state.step)
        self._progress.note(f"{why}: back from step {before} to the checkpoint of step {state.step}, and on with other prompts")
        if cancelled is not None:
            raise cancelled

    # ------------------------------------------------------------ saving, evaluation, stopping

    def check_fruit(self, drawn: int, accepted: int) -> None:
        """Raises `TrainingError` where the filters have left nothing of the rollouts of several cycles."""
        if not drawn or accepted:
            self._fruitless_cycles = 0
            return
        self._fruitless_cycles += 1
        if self._fruitless_cycles >= _PATIENCE:
            reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self._parts.gate.counts.items()))
            raise TrainingError(
                f"no rollout passed the filters in {_PATIENCE} cycles (rejected so far: {reasons}): the student may write gibberish; "
                "raise train.cold_start_tokens, loosen data.filters, or look into rejected.jsonl"
            )

    @asynccontextmanager
    async def _kept_on_failure(self) -> AsyncIterator[None]:
        """Save before an error leaves, unless the student itself has gone wrong, or a part of it is lost."""
        try:
            yield
        except (DivergedError, ModelError, RankError, RollBackError, _StopRequestedError):
            raise
        except Exception:
            await self._save()
            raise

    def _is_due_to_save(self) -> bool:
        return self.state.step - self._saved_step >= self._config.train.checkpoint_every

    def _is_due_to_evaluate(self, before_step: int) -> bool:
        every = self._config.eval.every
        return bool(every) and self.state.step // every > before_step // every and not self._budgets.is_spent()

    async def _save(self) -> None:
        if (self.state.step, self.state.bad_updates) != (self._saved_step, self._saved_bad_updates):
            await self._write()

    async def _write(self) -> None:
        with self._activity("saving"):
            self._books.close()
            self.state.seconds = self._timeline.seconds()
            self.state.busy_seconds = self._timeline.busy_seconds()
            # as it is now: where cycles overlap, drawing goes on meanwhile
            snapshot = deepcopy(self.state)
            _, cancelled = await to_the_end(self._parts.run_blocking(self._parts.save, snapshot))
            self.state.teacher_retries = snapshot.teacher_retries
        self._saved_step, self._saved_bad_updates = self.state.step, self.state.bad_updates
        self._metrics.trace(self._timeline.to_json())
        if cancelled is not None:
            raise cancelled

    async def _push_weights(self) -> None:
        """Just before the engine writes, so that a cold start pushes none."""
        self._progress.activity("sampling")
        await self._weights.push(self.state.step)

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


class _StopRequestedError(Exception):
    """A stop request was heard."""
