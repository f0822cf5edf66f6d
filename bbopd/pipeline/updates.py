"""One optimizer step as the loop sees it: batches assembled, trained on, booked, and told to whoever watches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bbopd.config import RunConfig
from bbopd.data.assemble import Item, assemble, rollout_of
from bbopd.data.rejected import Rejection
from bbopd.data.shares import share_over_ranks
from bbopd.errors import TrainingError
from bbopd.pipeline.bad_updates import BadUpdates, Fault, RollBackError
from bbopd.pipeline.books import Books
from bbopd.pipeline.budgets import Budgets
from bbopd.pipeline.metrics import Recorder
from bbopd.pipeline.parts import Parts, to_the_end
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.reward_figures import reward_figures
from bbopd.pipeline.rollout_figures import rollout_figures
from bbopd.pipeline.state import RunState
from bbopd.pipeline.timing import Timeline
from bbopd.trainer.step import StepMetrics

_LARGE_TAIL = 0.2  # share of the teacher's mass outside the ids


class Updates:
    """Trains ``parts.trainer`` step by step and keeps ``state`` and ``books`` true to what it has done."""

    def __init__(
        self,
        config: RunConfig,
        parts: Parts,
        state: RunState,
        books: Books,
        *,
        metrics: Recorder,
        timeline: Timeline,
        progress: Progress,
    ) -> None:
        self._config, self._parts, self._state, self._books = config, parts, state, books
        self._budgets = Budgets(config, state)
        self._bad_updates = BadUpdates(config.train, state)
        self._metrics, self._timeline, self._progress = metrics, timeline, progress
        self._has_warned_of_tail = False
        self.weights_in_use = asyncio.Lock()
        """Held while they change; whoever needs them as they are may hold it too."""

    async def step(
        self, phase: str, micro_items: Sequence[Sequence[Item]], numbers: Sequence[int], cycle: int, figures: Mapping[str, Any]
    ) -> None:
        """Train once on ``micro_items``, the sequences ``numbers`` of the books; ``figures`` join its line in metrics.jsonl.

        A step that has begun is finished and booked even where this task is cancelled. Where it must not be applied, its sequences are
        rejected, and what follows is by `BadUpdates.answer`: nothing, its `TrainingError`, or a `RollBackError`.
        """
        items = [item for micro in micro_items for item in micro]
        tokens = sum(len(rollout_of(item)) for item in items)
        self._progress.activity("training")
        with self._timeline.activity("training", step=self._state.step + 1, cycle=cycle, tokens=tokens, sequences=len(items)):
            metrics, cancelled = await to_the_end(self._train(phase, micro_items))
        if isinstance(metrics, Fault):
            self.leave_out(metrics, items, numbers)
            if cancelled is not None:
                raise cancelled
            return
        state = self._state
        state.trained_tokens += metrics.tokens
        state.on_policy_tokens += metrics.rollout_tokens
        if phase == "cold_start":
            state.cold_start_steps += 1
            state.cold_start_tokens += metrics.labelled_tokens
        else:
            state.labelled_tokens += metrics.labelled_tokens
        self._books.train(numbers)
        self._bad_updates.applied(metrics)
        line = {
            "phase": phase,
            **_figures_of(metrics),
            "cycle": cycle,
            "on_policy_tokens": state.on_policy_tokens,
            "trained_tokens": state.trained_tokens,
            "elapsed": round(self._timeline.elapsed, 3),
            **figures,
            **rollout_figures(items, self._parts.gate.counts),
            **reward_figures(items),
            **state.bad_figures(),
            **self._cost(),
        }
        self._metrics.step(line)
        self._progress.advance(line, self._budgets.progress(phase, self._timeline.elapsed))
        self._warn_of_tail(metrics.teacher_tail_mass)
        if cancelled is not None:
            raise cancelled

    async def _train(self, phase: str, micro_items: Sequence[Sequence[Item]]) -> StepMetrics | Fault:
        try:
            return await self._update(phase, micro_items)
        except TrainingError as error:
            return Fault("nonfinite", str(error))

    async def _update(self, phase: str, micro_items: Sequence[Sequence[Item]]) -> StepMetrics | Fault:
        run, trainer = self._parts.run_blocking, self._parts.trainer
        if self._parts.ranks > 1:
            micro_items = share_over_ranks(micro_items, self._parts.ranks, self._config.train.micro_batch_tokens)
        gradients = await run(lambda: trainer.accumulate([assemble(items, self._parts.want) for items in micro_items]))
        if (fault := self._bad_updates.judge(phase, gradients)) is not None:
            await run(trainer.drop)
            return fault
        with self._timeline.wait("training", "the engine is given the weights"):
            await self.weights_in_use.acquire()
        try:
            metrics = await run(trainer.update, gradients)
            self._state.step = metrics.step  # before anyone else may call these weights by their version
            return metrics
        finally:
            self.weights_in_use.release()

    def leave_out(self, fault: Fault, items: Sequence[Item], numbers: Sequence[int]) -> None:
        """Reject the sequences of an update that is not made; raises as `step` does."""
        tokens = sum(len(rollout_of(item)) for item in items)
        for item in items:
            self._parts.gate.reject(rollout_of(item), Rejection("bad_update", detail=fault.said))
        self._books.reject(numbers)
        answer = self._bad_updates.answer(fault, tokens)
        if answer == "roll_back":
            raise RollBackError(fault.said)
        self._progress.note(f"{fault.said}: it was skipped, with its {len(items)} sequences of {tokens:,} tokens")

    def _cost(self) -> dict[str, float]:
        counts = self._parts.cache_counts or {}
        figures: dict[str, float] = {f"cache_{name}": counts[name] for name in ("hits", "misses") if name in counts}
        figures |= self._parts.answer_counts
        if self._parts.spending is not None:
            figures["teacher_cost"] = round(self._parts.spending().total, 9)
        return figures

    def _warn_of_tail(self, tail_mass: float | None) -> None:
        if tail_mass is not None and tail_mass > _LARGE_TAIL and not self._has_warned_of_tail:
            self._has_warned_of_tail = True
            ways = "lower objective.temperature, or set teacher.signal=full"
            if self._config.objective.name == "aligned":
                ways = "or take a teacher with more tokens in common with the student, as ids without a counterpart are in it too"
            self._progress.note(
                f"{self._config.teacher.topk} ids a token leave {tail_mass:.0%} of the teacher's mass in the tail, where the student "
                f"learns only the total: raise teacher.topk, {ways}"
            )


def _figures_of(metrics: StepMetrics) -> dict[str, Any]:
    """One line of them, the objective's own among the others."""
    line = asdict(metrics)
    more = line.pop("more")
    return {**line, **more}
