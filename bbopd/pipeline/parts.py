"""What a loop turns, as protocols, so that any piece may be a fake; and how it runs what would block it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from torch import Tensor

from bbopd.data.assemble import Item
from bbopd.data.rejected import Rejection
from bbopd.data.streams import each
from bbopd.pipeline.state import RunState
from bbopd.teachers.budget import Spending
from bbopd.trainer.step import Gradients, StepMetrics
from bbopd.types import DistillBatch, Prompt, Rollout, RolloutEngine, Sampling, ScoredRollout, SignalSpec, Unscored

Answer = TypeVar("Answer")


class Prompts(Protocol):
    """Where a loop draws from; ``position`` is all its state."""

    position: dict[str, Any]

    def next_prompts(self, count: int) -> list[Prompt]: ...
    def next_labelled(self, count: int) -> list[Prompt]: ...


class Gate(Protocol):
    """What decides on a finished rollout, and keeps count of all that will not be trained on."""

    def begin_cycle(self) -> None: ...
    def accepts(self, rollout: Rollout) -> bool: ...
    def reject(self, rollout: Rollout, rejection: Rejection) -> None: ...
    @property
    def counts(self) -> Mapping[str, int]: ...


class Scores(Protocol):
    """The teacher, as far as a loop knows it: of every rollout it says something, or that nothing is to be learned from it."""

    def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout | Unscored]: ...


class Opponent(Protocol):
    """Who learns from the same answers as the student, one step a cycle."""

    def begin_cycle(self, cycle: int) -> None: ...
    def end_warm_up(self) -> None: ...
    async def face(self, items: Sequence[Item], engine: RolloutEngine, sampling: Sampling) -> int: ...
    def learn(self) -> Mapping[str, float]: ...


class Trains(Protocol):
    """The trainer, as far as a loop knows it."""

    planned_steps: int

    def accumulate(self, micro_batches: Sequence[DistillBatch]) -> Gradients: ...
    def update(self, gradients: Gradients) -> StepMetrics: ...
    def drop(self) -> None: ...
    def weights(self, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]: ...


class Blocking(Protocol):
    """Runs a call that takes long, and gives what it returns."""

    def __call__(self, call: Callable[..., Answer], /, *arguments: Any) -> Awaitable[Answer]: ...


async def at_once(call: Callable[..., Answer], /, *arguments: Any) -> Answer:
    """Nothing else goes on meanwhile."""
    return call(*arguments)


def in_executor(executor: Executor) -> Blocking:
    """The event loop goes on meanwhile."""

    async def run(call: Callable[..., Answer], /, *arguments: Any) -> Answer:
        return await asyncio.get_running_loop().run_in_executor(executor, call, *arguments)

    return run


async def to_the_end(work: Awaitable[Answer]) -> tuple[Answer, asyncio.CancelledError | None]:
    """What ``work`` gives, even where this task is cancelled meanwhile: a thread cannot be, and must not be left behind.

    The cancellation comes back with it, to be raised once the result is booked.
    """
    task = asyncio.ensure_future(work)
    cancelled = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    return task.result(), cancelled


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that a loop turns; built by `session.open_session`, or from fakes in a test.

    ``by_group``: the answers to one prompt go to the teacher one after the other, as a `Group`. ``opponent`` is who
    learns from the same answers. ``overlaps`` says that the engine writes
    while the trainer trains, so it needs weights of its own; ``run_blocking`` must then leave the event loop free, and run one call after
    another. ``shares_weights`` says that the engine writes with the trainer's own tensors, so that a push is no more than the new version.
    ``agreement`` checks an engine that does not; ``sleep`` has it give its memory to the trainer until the next push. ``choose`` gives
    rollouts the ids that the teacher is asked about, where the student chooses them; ``write_labels`` gives labelled sequences the
    teacher's own answers, where it writes them. ``spending`` is that on a teacher that costs money, ``cache_counts`` of one whose answers
    are kept: hits, misses and more, in this session; ``answer_counts`` of one whose text is read:
    what became of it. ``engine_count`` is how many engines write as one; ``ranks`` how many train together. ``roll_back`` puts all that
    is trained back to the last whole checkpoint, whose state it returns; ``is_saved`` says that one lies there already.
    """

    trainer: Trains
    engine: RolloutEngine
    prompts: Prompts
    gate: Gate
    teacher: Scores | None
    want: SignalSpec | None
    save: Callable[[RunState], None]
    roll_back: Callable[[], RunState] | None = None
    is_saved: bool = False
    agreement: Callable[[Iterable[Rollout], int], Mapping[str, float]] | None = None
    sleep: Callable[[], Awaitable[None]] | None = None
    choose: Callable[[Sequence[Rollout]], list[Rollout]] | None = None
    write_labels: Scores | None = None
    spending: Callable[[], Spending] | None = None
    cache_counts: Mapping[str, int] | None = None
    answer_counts: Mapping[str, int] = field(default_factory=dict)
    engine_count: Callable[[], int] | None = None
    by_group: bool = False
    opponent: Opponent | None = None
    overlaps: bool = False
    shares_weights: bool = False
    run_blocking: Blocking = at_once
    ranks: int = 1

    async def with_candidates(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """``rollouts`` as the teacher shall see them."""
        if self.choose is None:
            return list(rollouts)
        chosen, cancelled = await to_the_end(self.run_blocking(self.choose, rollouts))
        if cancelled is not None:
            raise cancelled
        return chosen

    async def with_labels(self, labelled: Sequence[Rollout]) -> list[Rollout]:
        """``labelled`` as they shall be trained on, in their order."""
        if self.write_labels is None or not labelled:
            return list(labelled)
        answers = self.write_labels.score(each(labelled), SignalSpec("text"))
        return sorted([answer.rollout async for answer in answers], key=lambda rollout: rollout.draw)
