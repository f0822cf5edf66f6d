"""Rewards in the place of a teacher: whole answers are judged beside their siblings, and the advantage is the signal of every token."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np

from bbopd.errors import BadAnswerError, BudgetSpentError, TeacherError
from bbopd.objectives.group_advantages import group_advantages, group_std
from bbopd.types import Judge, Reward, Rollout, ScoredRollout, SignalSpec, TeacherSignal, Unscored

_PATIENCE = 256  # answers in a row that could not be judged before the run is given up

Answer = ScoredRollout | Unscored


@dataclass(frozen=True, slots=True)
class _Done:
    answers: Sequence[Answer]
    tokens: int


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


class GroupRewards:
    """What the loop asks as its teacher. Labelled sequences, which have no group, come back as they are.

    Parameters
    ----------
    judge : asked about one group at a time, about several groups at once.
    divide_by_std : as in `group_advantages`.
    inflight_tokens : prompts and answers of the groups under way, until they have been taken; a single larger group still goes, alone.
    """

    def __init__(self, judge: Judge, *, divide_by_std: bool = True, inflight_tokens: int = 8192) -> None:
        self._judge = judge
        self._divide_by_std = divide_by_std
        self._inflight_tokens = inflight_tokens
        self._unjudged_in_a_row = 0

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncGenerator[Answer, None]:
        """Groups as each is judged, in any order; their members come one after the other.

        Raises
        ------
        BadAnswerError : the judge gave no finite number to each.
        TeacherError : the judge failed, or could judge nothing for long.
        """
        assert want.level == "text"
        current = _Pass(self._judged, self._inflight_tokens)
        async with aclosing(current.run(rollouts)) as answers:
            async for answer in answers:
                yield answer

    async def _judged(self, group: Sequence[Rollout]) -> Sequence[Answer]:
        said = await self._judge.rewards(group)
        if len(said) != len(group):
            raise BadAnswerError(f"{len(said)} rewards came for the {len(group)} answers to prompt {group[0].prompt.prompt_id}")
        for rollout, reward in zip(group, said, strict=True):
            if isinstance(reward, Reward) and not all(map(math.isfinite, (reward.value, *reward.parts.values()))):
                raise BadAnswerError(f"the reward of rollout {rollout.rollout_id} is no finite number: {reward}")
            self._note(reward)
        values = [reward.value for reward in said if isinstance(reward, Reward)]
        with np.errstate(over="ignore", invalid="ignore"):
            found, std = group_advantages(values, divide_by_std=self._divide_by_std).astype(np.float32), group_std(values)
        if not np.isfinite(found).all():
            raise BadAnswerError(f"the rewards of the answers to prompt {group[0].prompt.prompt_id} are too large: {values}")
        advantages = iter(found)
        return [
            replace(reward, rollout=rollout)
            if isinstance(reward, Unscored)
            else ScoredRollout(rollout, _signal(rollout, next(advantages)), reward, std)
            for rollout, reward in zip(group, said, strict=True)
        ]

    def _note(self, reward: Reward | Unscored) -> None:
        self._unjudged_in_a_row = self._unjudged_in_a_row + 1 if isinstance(reward, Unscored) else 0
        if isinstance(reward, Unscored) and self._unjudged_in_a_row >= _PATIENCE:
            raise TeacherError(f"the last {_PATIENCE} answers could not be judged, this one because: {reward.reason}: {reward.detail}")


def _signal(rollout: Rollout, advantage: float) -> TeacherSignal:
    return TeacherSignal("text", advantages=np.full(len(rollout), advantage, np.float32))


class _Pass:
    """One stream of rollouts, gathered into their groups, which are judged side by side."""

    def __init__(self, judged: Callable[[Sequence[Rollout]], Awaitable[Sequence[Answer]]], inflight_tokens: int) -> None:
        self._judged = judged
        self._limit = inflight_tokens
        self._tokens = 0
        self._room = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Queue[_Done | _End] = asyncio.Queue()

    async def run(self, rollouts: AsyncIterator[Rollout]) -> AsyncGenerator[Answer, None]:
        feeder = asyncio.create_task(self._feed(rollouts))
        try:
            while isinstance(ready := await self._ready.get(), _Done):
                for answer in ready.answers:
                    yield answer
                self._tokens -= ready.tokens
                self._room.set()
            if isinstance(ready.error, BudgetSpentError):
                feeder.cancel()
                await asyncio.gather(*self._running)  # each comes to its own end, so that what is paid for is kept
            if ready.error is not None:
                raise ready.error
        finally:
            for task in (feeder, *self._running):
                task.cancel()
            await asyncio.gather(feeder, *self._running, return_exceptions=True)

    async def _feed(self, rollouts: AsyncIterator[Rollout]) -> None:
        """Gather groups as they come, each into a task of its own once there is room; labelled sequences go straight through."""
        open_groups: dict[int, list[Rollout]] = {}
        error: Exception | None = None
        try:
            async for rollout in rollouts:
                if rollout.is_labelled:
                    self._ready.put_nowait(_Done([ScoredRollout(rollout, TeacherSignal("text"))], 0))
                    continue
                assert rollout.group is not None, "the pipeline puts rollouts into groups"
                members = open_groups.setdefault(rollout.group.number, [])
                members.append(rollout)
                if len(members) == rollout.group.size:
                    await self._begin(open_groups.pop(rollout.group.number))
            assert not open_groups, "the pipeline ends with whole groups"
            while self._running:
                await asyncio.wait(set(self._running))
        except Exception as caught:
            error = caught
        self._ready.put_nowait(_End(error))

    async def _begin(self, group: Sequence[Rollout]) -> None:
        tokens = sum(len(rollout.all_ids) for rollout in group)
        while self._tokens and self._tokens + tokens > self._limit:
            self._room.clear()
            await self._room.wait()
        self._tokens += tokens
        task = asyncio.create_task(self._judge(group, tokens))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _judge(self, group: Sequence[Rollout], tokens: int) -> None:
        try:
            self._ready.put_nowait(_Done(await self._judged(group), tokens))
        except Exception as error:
            self._ready.put_nowait(_End(error))
