"""A teacher that reads more than the student does: the same answers, after a prompt with more in it, such as the answer itself.

What it says of an answer's tokens is what it says of them there. The prompt in front is longer, the answer is the same ids, and a signal
has one row for each of these, so nothing needs to be laid side by side.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from bbopd.errors import DataError, TeacherError
from bbopd.teachers.prompt_ids import prompt_ids
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Context", "PrivilegedTeacher"]

_PLACES = re.compile(r"\{(prompt|reference)\}")


class Context:
    """Fills a template: ``{prompt}`` is what the student reads, ``{reference}`` the known answer to it.

    Of messages the last one of the user is what ``{prompt}`` stands for, and the filled template takes its place; the chat template does
    the rest. Of any other prompt it is the ids as they are, what a tokenizer puts in front of a text staying in front.
    """

    def __init__(self, template: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self._parts = _PLACES.split(template)  # text, name, text, name, ..., text
        self._tokenizer = tokenizer
        bare, framed = (tuple(tokenizer("a", add_special_tokens=special)["input_ids"]) for special in (False, True))
        self._front = framed[: next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)]

    @property
    def needs_reference(self) -> bool:
        return "reference" in self._parts[1::2]

    def ids(self, prompt: Prompt, reference: Sequence[int] | None) -> tuple[int, ...]:
        """The prompt that the teacher reads. Raises `DataError` where no answer is known and the template has a place for one."""
        if self.needs_reference and not reference:
            raise DataError(
                f"teacher.self.context has a place for {{reference}}, and no answer to prompt {prompt.prompt_id} is known: add responses "
                "to data.prompts, or write a context without it"
            )
        answer = str(self._tokenizer.decode(list(reference or ()), skip_special_tokens=True)).strip()
        if prompt.messages:
            return self._chat_ids(prompt, answer)
        asked = prompt.token_ids
        front = self._front if asked[: len(self._front)] == self._front else ()
        found = list(front)
        for text in self._filled(answer):
            found += asked[len(front) :] if text is None else self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tuple(found)

    def _chat_ids(self, prompt: Prompt, answer: str) -> tuple[int, ...]:
        last = max((place for place, (role, _) in enumerate(prompt.messages) if role == "user"), default=None)
        if last is None:
            raise DataError(f"prompt {prompt.prompt_id} has no message of a user, where teacher.self.context would be read: add one")
        asked = prompt.messages[last][1]
        filled = "".join(asked if text is None else text for text in self._filled(answer))
        messages = tuple(("user", filled) if place == last else message for place, message in enumerate(prompt.messages))
        return prompt_ids(replace(prompt, messages=messages), self._tokenizer, "of the student's own weights")

    def _filled(self, answer: str) -> list[str | None]:
        """The template's texts in a row; None is the place of the prompt."""
        pieces: list[str | None] = []
        text = ""
        for place, part in enumerate(self._parts):
            if place % 2 and part == "prompt":
                pieces += [text, None]
                text = ""
            else:
                text += answer if place % 2 else part
        return [piece for piece in (*pieces, text) if piece != ""]


class PrivilegedTeacher:
    """The `Teacher` protocol over another one, which is asked about the same answers after a ``context``."""

    def __init__(self, teacher: Teacher, context: Context) -> None:
        self.info = teacher.info
        self._teacher = teacher
        self._context = context

    def check_prompts(self, prompts: Sequence[Prompt], *, max_new_tokens: int) -> int:
        """The most tokens that the teacher reads, the answer included.

        Raises `DataError` where a prompt has no context, `TeacherError` where that leaves no room for an answer.
        """
        limit, most = self.info.max_sequence_tokens, 0
        for prompt in prompts:
            longest = len(self._context.ids(prompt, prompt.reference_ids)) + max(max_new_tokens, len(prompt.reference_ids or ()))
            if limit and longest > limit:
                raise TeacherError(
                    f"prompt {prompt.prompt_id} has, with teacher.self.context and an answer, up to {longest} tokens, and the student "
                    f"takes {limit}: shorten the context or the prompt, or lower rollouts.max_new_tokens"
                )
            most = max(most, longest)
        return most

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """As the teacher's own, of the answers of ``rollouts`` after its own prompt. A labelled one is itself the known answer."""
        asked: dict[str, Rollout] = {}

        async def questions() -> AsyncIterator[Rollout]:
            async for rollout in rollouts:
                asked[rollout.rollout_id] = rollout
                known = rollout.token_ids if rollout.is_labelled else rollout.prompt.reference_ids
                yield replace(rollout, prompt=replace(rollout.prompt, token_ids=self._context.ids(rollout.prompt, known)))

        async with aclosing(self._teacher.score(questions(), want)) as answers:  # type: ignore[type-var]
            async for scored in answers:
                yield ScoredRollout(asked.pop(scored.rollout.rollout_id), scored.signal)

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own, to the prompts as they are."""
        async with aclosing(self._teacher.complete(prompts, sampling)) as answers:  # type: ignore[type-var]
            async for completion in answers:
                yield completion
