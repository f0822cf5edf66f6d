"""Several teachers as one: every prompt is asked of the teachers that it names, and what they say counts as much as it says.

One teacher for a prompt is routing: its signal goes on as it is. Several are blended where the signal is one logprob a token: the weighted
mean of theirs gives the weighted mean of their advantages, as ``log q_old`` is the same in all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from bbopd.config_teacher import OWN_TEACHER
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher

__all__ = ["RoutedTeacher"]

Question = TypeVar("Question", Rollout, Prompt)
Reply = TypeVar("Reply", ScoredRollout, Completion)


class RoutedTeacher:
    """The `Teacher` protocol over the run's own teacher and ``others`` by their names, all with the same tokens."""

    def __init__(self, own: Teacher, others: Mapping[str, Teacher]) -> None:
        self.info = own.info
        self._teachers = {OWN_TEACHER: own, **others}

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncGenerator[ScoredRollout, None]:
        """Signals as each is there, with the weight of its teachers. Raises what a teacher raises, and closes the others then."""
        waiting: dict[str, dict[str, ScoredRollout]] = {}
        answers = self._ask(rollouts, lambda rollout: _named(rollout.prompt), lambda teacher, some: teacher.score(some, want))
        async with aclosing(answers):
            async for name, scored in answers:
                weights = _named(scored.rollout.prompt)
                parts = waiting.setdefault(scored.rollout.rollout_id, {})
                parts[name] = scored
                if len(parts) == len(weights):
                    del waiting[scored.rollout.rollout_id]
                    yield _blended([parts[one] for one in weights], list(weights.values()))

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncGenerator[Completion, None]:
        """Answers of the first teacher that each prompt names."""
        answers = self._ask(prompts, lambda prompt: list(_named(prompt))[:1], lambda teacher, some: teacher.complete(some, sampling))
        async with aclosing(answers):
            async for _, completion in answers:
                yield completion

    async def _ask(
        self,
        questions: AsyncIterator[Question],
        names_of: Callable[[Question], Iterable[str]],
        ask: Callable[[Teacher, AsyncIterator[Question]], AsyncIterator[Reply]],
    ) -> AsyncGenerator[tuple[str, Reply], None]:
        """Replies with the name of who gave them; a teacher that no prompt names is not asked."""
        found: asyncio.Queue[tuple[str, Reply] | None] = asyncio.Queue()
        asked: dict[str, asyncio.Queue[Question | None]] = {}
        tasks: list[asyncio.Task[None]] = []

        async def listen(name: str) -> None:
            replies: Any = ask(self._teachers[name], _until_none(asked[name]))
            async with aclosing(replies):
                async for reply in replies:
                    found.put_nowait((name, reply))

        async def hand_out() -> None:
            listeners: list[asyncio.Task[None]] = []
            async for question in questions:
                for name in names_of(question):
                    if name not in asked:
                        asked[name] = asyncio.Queue()
                        listeners.append(start(listen(name)))
                    asked[name].put_nowait(question)
            for queue in asked.values():
                queue.put_nowait(None)
            await asyncio.gather(*listeners)
            found.put_nowait(None)

        def start(work: Any) -> asyncio.Task[None]:
            task = asyncio.ensure_future(work)
            task.add_done_callback(lambda done: found.put_nowait(None) if not done.cancelled() and done.exception() else None)
            tasks.append(task)
            return task

        start(hand_out())
        try:
            while (reply := await found.get()) is not None:
                yield reply
            for task in tasks:
                if task.done() and not task.cancelled():
                    task.result()  # raises what ended it
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if (close := getattr(questions, "aclose", None)) is not None:
                await close()


async def _until_none(queue: asyncio.Queue[Question | None]) -> AsyncGenerator[Question, None]:
    while (question := await queue.get()) is not None:
        yield question


def _named(prompt: Prompt) -> dict[str, float]:
    """Who is asked about ``prompt``, with their weights."""
    return dict(prompt.teachers) or {OWN_TEACHER: 1.0}


def _blended(parts: Sequence[ScoredRollout], weights: Sequence[float]) -> ScoredRollout:
    """What ``parts``, each of another teacher, say together."""
    first, total = parts[0], float(sum(weights))
    if len(parts) == 1:
        return replace(first, weight=total)
    told = [part.signal.sampled for part in parts if part.signal.sampled is not None]
    assert len(told) == len(parts), "the configuration sees to that"
    sampled = np.average(np.stack(told).astype(np.float64), axis=0, weights=weights)
    signal = replace(first.signal, sampled=sampled.astype(np.float32))
    return replace(first, signal=signal, weight=total)
