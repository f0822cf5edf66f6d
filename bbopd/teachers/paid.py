"""A teacher whose answers cost money: each item is paid for out of a budget before the teacher hears of it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import TypeVar

from bbopd.teachers.budget import Budget, Reservation
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher

__all__ = ["PaidTeacher"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class PaidTeacher:
    """The `Teacher` protocol over another teacher, which does not count what it costs itself: items are charged by their tokens.

    `BudgetSpentError` ends a pass once no answer is due any more, so that whatever was paid has been handed on.
    """

    def __init__(self, teacher: Teacher, budget: Budget) -> None:
        self.info = teacher.info
        self._teacher = teacher
        self._budget = budget

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """As the teacher's own; a rollout costs its tokens, prompt and answer alike, at the price of prompts."""
        scoring = self._pass(
            rollouts,
            lambda items: self._teacher.score(items, want),
            lambda rollout: (len(rollout.all_ids), 0),
            lambda scored: (scored.rollout, None),
        )
        async with aclosing(scoring) as answers:
            async for scored in answers:
                yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own; an answer costs the tokens it has, a prompt that is text the most that it can have."""
        writing = self._pass(
            prompts,
            lambda items: self._teacher.complete(items, sampling),
            lambda prompt: (prompt.most_tokens, sampling.max_new_tokens),
            lambda completion: (completion.prompt, len(completion.token_ids)),
        )
        async with aclosing(writing) as answers:
            async for completion in answers:
                yield completion

    async def _pass(
        self,
        items: AsyncIterator[Item],
        ask: Callable[[AsyncIterator[Item]], AsyncIterator[Answer]],
        tokens_of: Callable[[Item], tuple[int, int]],
        charged: Callable[[Answer], tuple[Item, int | None]],
    ) -> AsyncGenerator[Answer, None]:
        open_by_item: dict[int, list[Reservation]] = {}

        async def funded() -> AsyncGenerator[Item, None]:
            async for item in items:
                open_by_item.setdefault(id(item), []).append(await self._budget.reserve(*tokens_of(item)))
                yield item

        try:
            async for answer in ask(funded()):
                item, written = charged(answer)
                self._budget.settle(open_by_item[id(item)].pop(), answer_tokens=written)
                yield answer
        finally:
            for reservation in (one for several in open_by_item.values() for one in several):
                self._budget.settle(reservation)  # it may have been answered, and so paid
