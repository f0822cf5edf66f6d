"""A teacher that only grades: it reads a question and an answer and says, in words, how good the answer is by a rubric.

Rewards from such grades are those of on-policy distillation by rubric (ROPD, arXiv 2605.07396) and its relatives: nothing of the teacher is
needed but a chat.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bbopd.config_grading import GradingConfig
from bbopd.errors import BadAnswerError, DataError, TeacherError
from bbopd.teachers.grades import read_grades, render, wanted_form
from bbopd.types import Completion, Prompt, Reward, Rollout, Sampling, Teacher, Unscored

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VerbalJudge"]

Messages = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Asked:
    """One answer's text on its way to a grade."""

    name: str
    messages: Messages
    grades: dict[str, float] | None = None
    trouble: str = ""


class VerbalJudge:
    """The `Judge` protocol over a teacher that takes messages.

    Parameters
    ----------
    teacher : who grades, its answers kept and paid for where that is wanted: a question that was asked before is not asked again.
    tokenizer : the student's, which reads its answers.
    grading : the rubric, and what becomes of a reply that is no grade.
    sampling : how the teacher writes its replies.

    Raises
    ------
    TeacherError : it takes no text.
    """

    def __init__(self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, grading: GradingConfig, sampling: Sampling) -> None:
        if not teacher.info.takes_text:
            raise TeacherError(
                f"teacher {teacher.info.model} takes no messages, so it cannot be asked for grades: serve one with a chat template"
            )
        self.counters: Counter[str] = Counter(grades=0, bad_grades=0)
        """Replies read so far, and those among them that were no grades."""
        self._teacher = teacher
        self._tokenizer = tokenizer
        self._grading = grading
        self._sampling = sampling

    async def rewards(self, group: Sequence[Rollout]) -> Sequence[Reward | Unscored]:
        """The weighted mean of the grades of each answer, from 0 to 1. The same text in one group is graded once.

        Raises
        ------
        BadAnswerError : an answer got no grade in ``retries + 1`` tries, and ``on_bad_grade`` is ``stop``.
        DataError : the reference answer shall be shown, and there is none.
        TeacherError, BudgetSpentError : as the teacher's own `complete`.
        """
        texts = [self._text(rollout.token_ids) for rollout in group]
        asked = {text: self._question(rollout, text) for rollout, text in zip(group, texts, strict=True)}
        for _ in range(self._grading.retries + 1):
            if left := [one for one in asked.values() if one.grades is None]:
                await self._ask(left)
        return [self._reward(rollout, asked[text]) for rollout, text in zip(group, texts, strict=True)]

    async def _ask(self, left: Sequence[_Asked]) -> None:
        """Ask about each once; what is no grade is answered with what is wrong with it, for the next time."""
        by_name = {one.name: one for one in left}

        async def questions() -> AsyncIterator[Prompt]:
            for one in left:
                yield Prompt(one.name, (), messages=one.messages)

        async with aclosing(self._teacher.complete(questions(), self._sampling)) as replies:  # type: ignore[type-var]
            async for reply in replies:
                self._read(by_name[reply.prompt.prompt_id], reply)

    def _read(self, asked: _Asked, reply: Completion) -> None:
        self.counters["grades"] += 1
        try:
            if reply.finish_reason != "stop":
                raise ValueError(f"it was cut off after {self._sampling.max_new_tokens} tokens (teacher.answers.max_new_tokens)")
            asked.grades = read_grades(self._grading, reply.text)
        except ValueError as error:
            self.counters["bad_grades"] += 1
            asked.trouble = str(error)
            said = f"That reply cannot be used: {error}. {wanted_form(self._grading)}"
            asked.messages = (*asked.messages, ("assistant", reply.text or "(nothing)"), ("user", said))

    def _reward(self, rollout: Rollout, asked: _Asked) -> Reward | Unscored:
        if asked.grades is None:
            said = (
                f"teacher {self._teacher.info.model} gave no grade for rollout {rollout.rollout_id} in {self._grading.retries + 1} tries, "
                f"at last: {asked.trouble}"
            )
            if self._grading.on_bad_grade == "stop":
                raise BadAnswerError(f"{said}; reword teacher.grading, or set teacher.grading.on_bad_grade=reject")
            return Unscored(rollout, "ungraded", said)
        weights = {criterion.name: criterion.weight for criterion in self._grading.criteria}
        mean = sum(weight * asked.grades[name] for name, weight in weights.items()) / sum(weights.values())
        return Reward(mean, asked.grades)

    # ------------------------------------------------------------ texts

    def _question(self, rollout: Rollout, answer: str) -> _Asked:
        prompt = rollout.prompt
        reference = None
        if self._grading.show_reference:
            if prompt.reference_ids is None:
                raise DataError(f"prompt {prompt.prompt_id} has no reference answer to show: set teacher.grading.show_reference=false")
            reference = self._text(prompt.reference_ids)
        question = prompt.text or self._text(prompt.token_ids)
        if prompt.messages:
            question = (
                prompt.messages[0][1] if len(prompt.messages) == 1 else "\n".join(f"{role}: {text}" for role, text in prompt.messages)
            )
        message = render(self._grading, question, answer, reference)
        return _Asked(f"grade of {rollout.rollout_id}", (("user", message),))

    def _text(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
