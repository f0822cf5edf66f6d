"""One update cycle up to its training data: draw, sample, filter, score.

A rollout goes to the teacher as soon as it is finished and has passed the filters, while others are still being written; or, where a
run must repeat itself, once all are, in the order of drawing, so that the teacher's batches are the same too. The items come back in
the order of drawing, so that the same cycle gives the same batches whatever order they finished in.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TypeVar

from bbopd.config import RunConfig
from bbopd.data.assemble import Item, rollout_of
from bbopd.data.rejected import Rejection
from bbopd.data.streams import each
from bbopd.pipeline.parts import Scores
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.pipeline.timing import Activity, Timeline
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling, SignalSpec, Unscored

Answer = TypeVar("Answer")


@dataclass(slots=True)
class CycleItems:
    """What one cycle has to train on: scored rollouts, or bare ones where the objective asks no teacher.

    ``accepted`` counts the rollouts that passed the filters; those that the teacher then left unscored are not among the items.
    """

    items: list[Item] = field(default_factory=list)
    drawn_rollouts: int = 0
    accepted: int = 0
    sampled_tokens: int = 0
    scored_tokens: int = 0


async def collect_cycle(
    rollout_prompts: Sequence[Prompt],
    labelled_prompts: Sequence[Prompt],
    *,
    engine: RolloutEngine,
    teacher: Scores | None,
    want: SignalSpec | None,
    sampling: Sampling,
    cycle: int,
    accept: Callable[[Rollout], bool],
    reject: Callable[[Rollout, Rejection], None],
    choose: Callable[[Sequence[Rollout]], Awaitable[list[Rollout]]],
    write_labels: Callable[[Sequence[Rollout]], Awaitable[list[Rollout]]],
    by_group: bool,
    stream: bool,
    timeline: Timeline,
    progress: Progress,
) -> CycleItems:
    """Sample every prompt once, filter, and have the rollouts and the labelled sequences scored.

    ``rollout_prompts`` holds a prompt as often as it shall be answered. ``accept`` decides on a finished rollout and keeps the books on
    rejected ones; ``reject`` is told of what the teacher leaves unscored. ``write_labels`` gives labelled sequences the teacher's answers,
    where it writes them, ``choose`` these and what was accepted the ids to ask about. ``by_group`` sends the answers to one prompt on
    together. ``stream`` sends each rollout on at once, else all are sent together when the last one is finished. ``timeline`` and
    ``progress`` hear "sampling" while the student writes and "scoring" once only the teacher is waited for. Raises what the engine or the
    teacher raises; both are then closed. ``cycle`` is its number in the run.
    """
    result = CycleItems(drawn_rollouts=len(rollout_prompts))
    sampling_items, scoring_items = timeline.items("sampling"), timeline.items("scoring")
    switch = _Switch(timeline, progress)
    groups = PromptGroups(rollout_prompts, by_group=by_group)
    labelled = [as_labelled(prompt, draw=len(rollout_prompts) + index, cycle=cycle) for index, prompt in enumerate(labelled_prompts)]

    async def asked() -> AsyncGenerator[Prompt, None]:
        for draw, prompt in enumerate(rollout_prompts):
            sampling_items.enter(draw)
            yield prompt
            await asyncio.sleep(0)  # others get a turn

    async def given() -> AsyncGenerator[Rollout, None]:
        async with aclosing(to_ask()) as rollouts:
            async for rollout in rollouts:
                scoring_items.enter(rollout.draw)
                yield rollout

    async def to_ask() -> AsyncGenerator[Rollout, None]:
        async with aclosing(to_score()) as rollouts:
            if not stream:  # none goes before all are ready: what shares the teacher's batch must not depend on how long choosing takes
                for rollout in await choose([rollout async for rollout in rollouts]):
                    yield rollout
                return
            async for rollout in rollouts:
                for chosen in await choose([rollout]):
                    yield chosen

    async def written() -> AsyncGenerator[Rollout, None]:
        if not rollout_prompts:
            return
        switch.to("sampling")
        async with aclosing(as_generator(engine.generate(asked(), sampling))) as rollouts:
            async for rollout in rollouts:
                sampling_items.leave(rollout.draw, rollout.rollout_id, tokens=len(rollout), version=rollout.weights_version)
                result.sampled_tokens += len(rollout)
                yield rollout

    async def to_score() -> AsyncGenerator[Rollout, None]:
        finished: AsyncIterator[Rollout] = written()
        if not stream:
            finished = each(sorted([rollout async for rollout in finished], key=lambda rollout: rollout.draw))
            switch.to("scoring")
        async with aclosing(as_generator(finished)) as rollouts:
            async for rollout in rollouts:
                is_accepted = accept(rollout)
                result.accepted += is_accepted
                for ready in groups.accept(rollout) if is_accepted else groups.reject(rollout.draw):
                    yield ready
        switch.to("scoring")
        if want is not None and want.rollouts_only:
            result.items.extend(await write_labels(labelled))
            return
        for rollout in await write_labels(labelled):
            yield rollout

    try:
        if teacher is None or want is None:
            result.items = [item async for item in to_score()]
        else:
            source = given()
            async with aclosing(source), aclosing(as_generator(teacher.score(source, want))) as answers:
                async for scored in answers:
                    rollout = scored.rollout
                    scoring_items.leave(rollout.draw, rollout.rollout_id, tokens=len(rollout))
                    if isinstance(scored, Unscored):
                        reject(rollout, Rejection(scored.reason, detail=scored.detail))
                        continue
                    result.scored_tokens += len(rollout)
                    result.items.append(scored)
    finally:
        sampling_items.close()
        scoring_items.close()
        switch.end()
    result.items.sort(key=lambda item: rollout_of(item).draw)
    return result


def sampling_of(config: RunConfig, cycle: int) -> Sampling:
    """How the rollouts of update cycle ``cycle`` (from 0, over the whole run) are written."""
    rollouts = config.rollouts
    return Sampling(
        max_new_tokens=rollouts.max_new_tokens,
        temperature=rollouts.temperature,
        top_p=rollouts.top_p,
        top_k=rollouts.top_k,
        seed=config.train.seed * 1_000_003 + cycle,
    )


def as_labelled(prompt: Prompt, *, draw: int, cycle: int = 0) -> Rollout:
    """A prompt's true continuation as a sequence to train on, with a name of its own in every cycle. The prompt must have one."""
    assert prompt.reference_ids is not None, f"prompt {prompt.prompt_id} has no reference"
    return Rollout(
        rollout_id=f"{prompt.prompt_id}#reference{cycle}.{draw}",
        prompt=replace(prompt, reference_ids=None),
        token_ids=prompt.reference_ids,
        origin="reference",
        finish_reason="reference",
        draw=draw,
    )


async def as_generator(source: AsyncIterator[Answer]) -> AsyncGenerator[Answer, None]:
    """Wrap any async iterator so that it can be closed early, closing what stands behind it where that can be closed."""
    try:
        async for item in source:
            yield item
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()


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
