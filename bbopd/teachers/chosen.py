"""A teacher of which only the best is heard: several answers to every prompt, and one of them kept by a score, or none.

Rejection sampling, best of n: what is learned by cross-entropy is then the teacher's own choice of words where a measure liked them best.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from bbopd.errors import TeacherError
from bbopd.teachers.written import WritingTeacher
from bbopd.types import Completion, Prompt, Reward, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherSignal, Unscored

__all__ = ["Answer", "ChoosingTeacher", "Scores", "teacher_logprob"]

_PATIENCE = 256  # prompts in a row without an answer that will do before the run is given up
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """One answer of the teacher: as it wrote it, and as the student would learn it."""

    completion: Completion
    rollout: Rollout


Scores = Callable[[Sequence[Answer]], Awaitable[Sequence[float | None]]]
"""What the answers to one prompt are worth, in their order; None: it will not do."""


class ChoosingTeacher:
    """In the place of a `WritingTeacher`, over it.

    Parameters
    ----------
    writing : writes, each answer with a seed of its own, so that each is kept by itself where answers are kept.
    scores : the higher the better; of equal ones the first is kept.
    samples : answers to a prompt.
    min_score : less will not do.
    """

    def __init__(self, writing: WritingTeacher, scores: Scores, *, samples: int, min_score: float | None = None) -> None:
        self.counters: Counter[str] = Counter(answers=0, prompts_without_answer=0)
        """Answers that were compared, and prompts none of whose answers would do."""
        self._writing = writing
        self._scores = scores
        self._samples = samples
        self._min_score = min_score
        self._known: dict[str, ScoredRollout | Unscored] = {}
        """By prompt id: a prompt that comes again gets the same."""
        self._rejected_in_a_row = 0

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout | Unscored]:
        """Each of ``rollouts``, once all are there, with the best answer in place of its own.

        Raises `TeacherError` as the teacher does, and where no prompt gets an answer for long.
        """
        assert want.level == "text"
        asked = [rollout async for rollout in rollouts]
        new = {rollout.prompt.prompt_id: rollout for rollout in asked if rollout.prompt.prompt_id not in self._known}
        if new:
            await self._choose(list(new.values()))
        for rollout in asked:
            chosen = self._known[rollout.prompt.prompt_id]
            self._note(chosen)
            answered = replace(chosen.rollout, rollout_id=rollout.rollout_id, prompt=rollout.prompt, draw=rollout.draw)
            yield replace(chosen, rollout=answered)

    def _note(self, chosen: ScoredRollout | Unscored) -> None:
        self._rejected_in_a_row = self._rejected_in_a_row + 1 if isinstance(chosen, Unscored) else 0
        if isinstance(chosen, Unscored) and self._rejected_in_a_row >= _PATIENCE:
            raise TeacherError(f"none of the last {_PATIENCE} prompts has an answer that will do, this one because: {chosen.detail}")

    async def _choose(self, rollouts: Sequence[Rollout]) -> None:
        """Have all answers to all prompts written at once, then compare those to each prompt."""
        seeds = range(self._writing.sampling.seed, self._writing.sampling.seed + self._samples)
        written = await _all_of([self._write(rollouts, replace(self._writing.sampling, seed=seed)) for seed in seeds])
        answers = [[by_prompt[rollout.prompt.prompt_id] for by_prompt in written] for rollout in rollouts]
        scores = await _all_of([self._scores(several) for several in answers])
        for rollout, several, found in zip(rollouts, answers, scores, strict=True):
            self._known[rollout.prompt.prompt_id] = self._best(rollout, several, found)

    async def _write(self, rollouts: Sequence[Rollout], sampling: Sampling) -> dict[str, Answer]:
        by_prompt = {rollout.prompt.prompt_id: rollout for rollout in rollouts}

        async def questions() -> AsyncIterator[Prompt]:
            for rollout in rollouts:
                yield self._writing.question(rollout.prompt)

        found: dict[str, Answer] = {}
        async with aclosing(self._writing.complete(questions(), sampling)) as completions:  # type: ignore[type-var]
            async for completion in completions:
                name = completion.prompt.prompt_id
                found[name] = Answer(completion, self._writing.answered(by_prompt[name], *self._writing.ids(completion)))
        return found

    def _best(self, rollout: Rollout, answers: Sequence[Answer], scores: Sequence[float | None]) -> ScoredRollout | Unscored:
        self.counters["answers"] += len(answers)
        known = [score for score in scores if score is not None]
        best = max(known, default=None)
        if best is None or (self._min_score is not None and best < self._min_score):
            self.counters["prompts_without_answer"] += 1
            said = (
                "none of them will do" if best is None else f"the best has {best:.6g}, teacher.answers.min_score is {self._min_score:.6g}"
            )
            return Unscored(rollout, "low_score", f"of {len(answers)} answers of the teacher {said}")
        chosen = answers[list(scores).index(best)]
        std = float(np.std(known, ddof=1)) if len(set(known)) > 1 else 0.0
        return ScoredRollout(chosen.rollout, TeacherSignal("text"), Reward(best), std)


async def teacher_logprob(answers: Sequence[Answer]) -> Sequence[float | None]:
    """The mean logprob of a token of each answer, by the teacher that wrote it. Raises `TeacherError` where it does not say it."""
    for answer in answers:
        if answer.completion.token_ids and not answer.completion.logprobs:
            raise TeacherError(
                f"the teacher does not say how likely its answer to prompt {answer.completion.prompt.prompt_id} was: set "
                "teacher.answers.best_by to student, grade or a score of your own"
            )
    return [float(np.mean(answer.completion.logprobs)) if answer.completion.logprobs else None for answer in answers]


async def _all_of(work: Iterable[Awaitable[Result]]) -> list[Result]:
    """The results of all, begun at once. Where one fails the others come to their end first, so that what is paid for is kept."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return [result for result in results if not isinstance(result, BaseException)]
