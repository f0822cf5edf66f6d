"""Update cycles that overlap: one is trained while the next is written and scored, sequence by sequence.

    sample -> [written] -> score -> [scored] -> train

Three tasks and two bounded queues between them. The sampler begins a group of sequences as soon as `rollouts.max_staleness` lets it
(`ledger`), with the newest weights; labelled sequences go to the teacher in between the rollouts. The trainer takes what is scored in
the order it arrives, and starts as soon as a batch of tokens is there: a straggler goes into a later batch, at the latest into the last
one that may still train it. Weights are pushed while the trainer computes gradients, which only reads them, and only once a group is
written: an engine would wait for that anyway.

Whichever task fails ends the others; its error is the run's.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from bbopd.config import RunConfig
from bbopd.data.assemble import Item, rollout_of, split_into_steps
from bbopd.data.rejected import Rejection
from bbopd.errors import EngineError, TeacherError
from bbopd.pipeline.batches import BatchQueue
from bbopd.pipeline.books import Books, Draw
from bbopd.pipeline.budgets import Budgets
from bbopd.pipeline.changes import Changes, first_failure
from bbopd.pipeline.cycle import as_generator, as_labelled, sampling_of
from bbopd.pipeline.ledger import Ledger
from bbopd.pipeline.parts import Parts
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Timeline
from bbopd.pipeline.updates import Updates
from bbopd.pipeline.weights import Weights
from bbopd.types import Prompt, Rollout, SignalSpec, Unscored

_STARVED = "no batch, sampling"


class Overlap:
    """One stretch of overlapping cycles. ``after_step`` is awaited after every step, and says whether the pipeline shall run empty."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        state: RunState,
        *,
        books: Books,
        weights: Weights,
        updates: Updates,
        timeline: Timeline,
        progress: Progress,
        stop: asyncio.Event,
        check_fruit: Callable[[int, int], None],
        after_step: Callable[[], Awaitable[bool]],
    ) -> None:
        self._config, self._parts, self._state = config, parts, state
        self._books, self._weights, self._updates = books, weights, updates
        self._timeline, self._progress, self._stop = timeline, progress, stop
        self._check_fruit, self._after_step = check_fruit, after_step
        self._budgets = Budgets(config, state)
        self._per_cycle = config.rollouts.per_update  # also the bound of each queue: the trainer may leave the next cycle waiting, no more
        self._ledger = Ledger(per_cycle=self._per_cycle, max_staleness=config.rollouts.max_staleness)
        self._first_cycle = state.cycle + 1
        self._tasks = asyncio.TaskGroup()
        self._changed = Changes()
        self._written: deque[Rollout] = deque()
        self._written_tokens = 0  # of those that the student wrote; counted as they come and go, since every change looks at it
        self._scored = BatchQueue(room=self._per_cycle, batch_tokens=config.train.batch_tokens)
        self._sampling = timeline.items("sampling")
        self._scoring = timeline.items("scoring", idle="nothing to score")
        self._stale_in_a_row = 0
        self._is_running_empty = False  # no group is begun any more
        self._is_held = False  # the sampler begins nothing before the trainer has gone on
        self._waited: Mapping[tuple[str, str], float] = timeline.wait_seconds()

    async def run(self) -> None:
        """Until the budget is spent, the pipeline has run empty, or the run shall stop. Raises what the first task to fail raised."""
        try:
            async with self._tasks:
                beside = [self._tasks.create_task(work()) for work in (self._sample, self._score, self._hear_stop)]
                await self._train()
                for task in beside:
                    task.cancel()
        except BaseExceptionGroup as failures:
            raise first_failure(failures) from None
        finally:
            self._sampling.close()
            self._scoring.close()

    # ------------------------------------------------------------ sampling

    async def _sample(self) -> None:
        group = 0
        while await self._may_begin(group):
            draw = await self._begin(group)
            with self._timeline.activity("sampling", is_behind=True, span=f"group {group}", version=self._state.step):
                accepted = await self._write(draw)
            self._check_fruit(len(draw.rollouts), accepted)
            group += 1

    async def _may_begin(self, group: int) -> bool:
        with self._timeline.wait("sampling", "staleness"):
            while not (self._runs_empty() or self._ledger.may_begin(group)):
                self._hold()
                await self._changed.wait()
        if self._runs_empty():
            self._hold()
            return False
        self._is_held = False
        return True

    def _hold(self) -> None:
        if not self._is_held:
            self._is_held = True
            self._changed.tell()

    def _runs_empty(self) -> bool:
        """Whether no more is begun: it was asked for, or what is under way spends the budget."""
        tokens = self._scored.rollout_tokens + self._written_tokens
        self._is_running_empty = self._is_running_empty or self._budgets.is_spent(on_policy_tokens_under_way=tokens)
        return self._is_running_empty

    async def _begin(self, group: int) -> Draw:
        """Draw a group, once the engine has the weights of now."""
        config, rollouts = self._config, self._budgets.rollouts_of_cycle()
        with self._timeline.wait("sampling", "weights change"):
            await self._updates.weights_in_use.acquire()
        probe: list[Rollout] = []
        try:
            self._weights.figures = {}
            await self._weights.push(self._state.step)
            self._ledger.push(self._state.step)
            draw = self._books.draw(rollouts, config.rollouts.per_update - rollouts)
            distinct = list({prompt.prompt_id: prompt for prompt in draw.rollouts}.values())
            probe = await self._weights.probe(distinct, sampling_of(config, self._state.cycle), tokens=config.rollouts.agreement.tokens)
            self._books.book(draw)
            self._ledger.begin(group, draw.numbers[:rollouts], draw.numbers[rollouts:])
        finally:
            if not probe:
                self._updates.weights_in_use.release()
        if probe:
            self._tasks.create_task(self._check(probe))
        return draw

    async def _check(self, probe: list[Rollout]) -> None:
        """Weights stay as they are until the trainer, busy with gradients perhaps, has scored what the engine wrote with them."""
        try:
            await self._weights.check(probe)
        finally:
            self._updates.weights_in_use.release()

    async def _write(self, draw: Draw) -> int:
        """Have the rollouts of ``draw`` written; send on what the filters accept, labelled ones in between. How many they accepted."""
        self._parts.gate.begin_cycle()
        groups = PromptGroups(draw.rollouts, first=draw.first, by_group=self._parts.by_group)
        numbers = draw.numbers[len(draw.rollouts) :]
        known = [as_labelled(prompt, draw=number) for number, prompt in zip(numbers, draw.labelled, strict=True)]
        labels = self._tasks.create_task(self._parts.with_labels(known))
        labelled = deque(range(len(known)))
        accepted, written = 0, 0

        async def asked() -> AsyncGenerator[Prompt, None]:
            for number, prompt in zip(draw.numbers, draw.rollouts, strict=False):
                self._sampling.enter(number)
                yield prompt
                await asyncio.sleep(0)  # others get a turn

        sampling = sampling_of(self._config, self._state.cycle - 1)
        async with aclosing(as_generator(self._parts.engine.generate(asked(), sampling))) as answers:
            async for answer in answers:
                number = draw.first + answer.draw
                rollout = replace(answer, draw=number, rollout_id=f"{answer.prompt.prompt_id}#{number}")
                self._sampling.leave(number, rollout.rollout_id, tokens=len(rollout), version=rollout.weights_version)
                self._state.sampled_tokens += len(rollout)
                written += 1
                is_accepted = self._parts.gate.accepts(rollout)
                accepted += is_accepted
                if not is_accepted:
                    self._drop(number)
                for ready in groups.accept(rollout) if is_accepted else groups.reject(number):
                    await self._send(ready)
                while len(labelled) * len(draw.rollouts) > len(draw.labelled) * (len(draw.rollouts) - written):
                    await self._send((await labels)[labelled.popleft()])
        if written != len(draw.rollouts):
            raise EngineError(f"the rollout engine was asked for {len(draw.rollouts)} answers and ended after {written}")
        return accepted

    async def _send(self, rollout: Rollout) -> None:
        with self._timeline.wait("sampling", "the teacher's queue is full"):
            await self._changed.until(lambda: len(self._written) < self._per_cycle)
        self._written.append(rollout)
        self._written_tokens += 0 if rollout.is_labelled else len(rollout)
        self._changed.tell()

    def _drop(self, number: int) -> None:
        self._books.reject([number])
        self._ledger.finish(number)
        self._changed.tell()

    # ------------------------------------------------------------ scoring

    async def _score(self) -> None:
        teacher, want = self._parts.teacher, self._parts.want
        assert teacher, "only a run with a teacher writes rollouts"
        assert want, "its objective asks it for a signal"
        source = self._to_score(want)
        async with aclosing(source), aclosing(as_generator(teacher.score(source, want))) as answers:
            async for scored in answers:
                rollout = scored.rollout
                self._scoring.leave(rollout.draw, rollout.rollout_id, tokens=len(rollout))
                if isinstance(scored, Unscored):
                    self._parts.gate.reject(rollout, Rejection(scored.reason, detail=scored.detail))
                    self._drop(rollout.draw)
                    continue
                self._state.scored_tokens += len(rollout)
                await self._pass_on(scored)
        raise TeacherError("the teacher has ended its answers while more was to be scored; the same command goes on from the checkpoint")

    async def _to_score(self, want: SignalSpec) -> AsyncGenerator[Rollout, None]:
        while True:
            await self._changed.until(lambda: bool(self._written))
            rollout = self._written.popleft()
            self._written_tokens -= 0 if rollout.is_labelled else len(rollout)
            self._changed.tell()
            if rollout.is_labelled and want.rollouts_only:
                await self._pass_on(rollout)
                continue
            self._scoring.enter(rollout.draw)
            for chosen in await self._parts.with_candidates([rollout]):
                yield chosen

    async def _pass_on(self, item: Item) -> None:
        if self._scored.is_full:
            with self._timeline.wait("scoring", "the trainer's queue is full"):
                await self._changed.until(lambda: not self._scored.is_full)
            self._scoring.idle_from_now()
        self._scored.append(item)
        self._changed.tell()

    # ------------------------------------------------------------ training

    async def _train(self) -> None:
        while await self._has_batch():
            items = self._take()
            if not items:
                continue
            train = self._config.train
            tokens = sum(len(rollout_of(item)) for item in items)
            (micro_items,) = split_into_steps(items, tokens, train.micro_batch_tokens, train.max_seq_len)
            numbers = [rollout_of(item).draw for item in items]
            figures = self._figures(items)
            self._parts.trainer.planned_steps = self._budgets.projected_steps()
            await self._updates.step("on_policy", micro_items, numbers, self._first_cycle + self._ledger.cycle, figures)
            for number in numbers:
                self._ledger.finish(number)
            self._is_running_empty = await self._after_step() or self._is_running_empty
            self._changed.tell()

    async def _has_batch(self) -> bool:
        """Wait for a batch of tokens, or for all that can come before the trainer goes on; whether there is one to train."""

        def is_over() -> bool:
            return self._stop.is_set() or self._budgets.is_spent() or (self._is_held and self._is_running_empty and not self._ledger.open)

        def is_ready() -> bool:
            return self._scored.has_batch or (len(self._scored) > 0 and self._all_are_here())

        if not (is_over() or is_ready()):
            stage, reason = ("sampling", _STARVED) if len(self._sampling) else ("scoring", "no batch, scoring")
            self._progress.activity(stage)
            with self._timeline.wait("training", reason):
                await self._changed.until(lambda: is_over() or is_ready())
        return not is_over()

    def _all_are_here(self) -> bool:
        return self._is_held and self._ledger.open == len(self._scored)

    def _take(self) -> list[Item]:
        """The next batch, less what is too old for it."""
        taken = self._scored.take(is_last=self._all_are_here())
        stale = [rollout for rollout in map(rollout_of, taken) if self._ledger.is_stale(rollout)]
        limit = self._config.rollouts.max_staleness
        for rollout in stale:
            self._parts.gate.reject(rollout, Rejection("stale", figure=self._ledger.staleness(rollout), limit=limit))
            self._drop(rollout.draw)
        self._stale_in_a_row = self._stale_in_a_row + len(stale) if len(stale) == len(taken) else 0
        if self._stale_in_a_row > 2 * self._per_cycle:
            raise EngineError(
                f"the last {self._stale_in_a_row} rollouts were too old to be trained on (rollouts.max_staleness {limit}): the engine says "
                f"they are of weights {stale[-1].weights_version}, and has been given {self._state.step}; take rollouts.engine=hf"
            )
        self._changed.tell()
        return [item for item in taken if rollout_of(item) not in stale]

    def _figures(self, items: list[Item]) -> dict[str, Any]:
        """What metrics.jsonl says of the pipeline with a step on ``items``; seconds waited are those since the step before."""
        rollouts = [rollout_of(item) for item in items if not rollout_of(item).is_labelled]
        staleness = [self._ledger.staleness(rollout) or 0 for rollout in rollouts]
        waited = self._timeline.wait_seconds()
        by_stage = {f"{stage}_wait_seconds": 0.0 for stage in ("sampling", "scoring", "training")}
        for (stage, reason), seconds in waited.items():
            by_stage[f"{stage}_wait_seconds"] += seconds - self._waited.get((stage, reason), 0.0)
        starved = ("training", _STARVED)
        by_stage["starved_seconds"] = waited.get(starved, 0.0) - self._waited.get(starved, 0.0)
        self._waited = waited
        return {
            **self._weights.figures,
            **({} if self._parts.engine_count is None else {"engines": self._parts.engine_count()}),
            "staleness_mean": sum(staleness) / max(1, len(staleness)),
            "staleness_max": max(staleness, default=0),
            "stragglers": sum(self._ledger.is_straggler(rollout.draw) for rollout in rollouts),
            **{name: round(seconds, 4) for name, seconds in by_stage.items()},
        }

    # ------------------------------------------------------------ between the tasks

    async def _hear_stop(self) -> None:
        await self._stop.wait()
        self._changed.tell()
