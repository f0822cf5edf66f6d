"""A teacher that is heard by its words alone: every labelled sequence gets the answer that the teacher writes to its prompt.

Text goes in and text comes out, so that neither side needs the other's tokens: the teacher's tokenizer and chat template read the
prompt, the student's read the answer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from bbopd.errors import TeacherError
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher, TeacherSignal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["WritingTeacher"]


class WritingTeacher:
    """The `Teacher` protocol at level ``text`` over another teacher.

    Parameters
    ----------
    teacher : who writes.
    tokenizer : the student's; answers become its ids, with its end of text where the teacher came to an end.
    sampling : how the teacher writes.
    max_seq_len : tokens of prompt and answer together, in the student's ids; longer answers are cut.
    shares_ids : teacher and student number the same tokens alike: a teacher that takes no text is given the student's ids.

    Raises
    ------
    TeacherError : it takes no text, and its ids are others.
    """

    def __init__(
        self, teacher: Teacher, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, *, max_seq_len: int, shares_ids: bool
    ) -> None:
        if not teacher.info.takes_text and not shares_ids:
            raise TeacherError(
                f"teacher {teacher.info.model} takes prompts as its own token ids alone, which are not the student's: serve it so that it "
                "takes text (`bbopd serve` does), or take a student of the teacher's family"
            )
        self.info = teacher.info
        self._teacher = teacher
        self._tokenizer = tokenizer
        self.sampling = sampling
        self._max_seq_len = max_seq_len
        self._known: dict[str, tuple[tuple[int, ...], bool]] = {}
        """By prompt id: what the teacher wrote, and whether it came to an end; a prompt that comes again gets the same."""

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Each of ``rollouts`` with the teacher's answer in place of its own, as each is written, in any order.

        Raises `TeacherError` as the teacher's own `complete` does, and for an answer without text or end.
        """
        assert want.level == "text"
        waiting: dict[str, list[Rollout]] = {}
        ready: list[Rollout] = []

        async def unknown() -> AsyncIterator[Prompt]:
            async for rollout in rollouts:
                name = rollout.prompt.prompt_id
                if name in self._known:
                    ready.append(rollout)
                elif name in waiting:
                    waiting[name].append(rollout)
                else:
                    waiting[name] = [rollout]
                    yield self.question(rollout.prompt)

        async with aclosing(self._teacher.complete(unknown(), self.sampling)) as completions:  # type: ignore[type-var]
            async for completion in completions:
                name = completion.prompt.prompt_id
                self._known[name] = self.ids(completion)
                for rollout in waiting.pop(name):
                    yield ScoredRollout(self.answered(rollout, *self._known[rollout.prompt.prompt_id]), TeacherSignal("text"))
        for rollout in ready:
            yield ScoredRollout(self.answered(rollout, *self._known[rollout.prompt.prompt_id]), TeacherSignal("text"))

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own, of prompts that it can read."""
        async with aclosing(self._teacher.complete(prompts, sampling)) as completions:  # type: ignore[type-var]
            async for completion in completions:
                yield completion

    def question(self, prompt: Prompt) -> Prompt:
        """What the teacher is asked: the prompt as text or messages, or as ids where it takes no other."""
        if not self.info.takes_text:
            return Prompt(prompt.prompt_id, prompt.token_ids, text=prompt.text, messages=prompt.messages)
        text = prompt.text or str(self._tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))
        return Prompt(prompt.prompt_id, (), text="" if prompt.messages else text, messages=prompt.messages)

    def ids(self, completion: Completion) -> tuple[tuple[int, ...], bool]:
        """An answer as the student's ids, and whether it came to an end. Raises `TeacherError` for one without text or end."""
        ids, is_whole = self._tokenizer(completion.text, add_special_tokens=False)["input_ids"], completion.finish_reason == "stop"
        if not ids and not is_whole:
            raise TeacherError(
                f"teacher {self.info.model} wrote {len(completion.token_ids)} tokens without any text to prompt "
                f"{completion.prompt.prompt_id}: look at its chat template and end of text, or leave the prompt out"
            )
        return tuple(ids), is_whole

    def answered(self, rollout: Rollout, ids: tuple[int, ...], is_whole: bool) -> Rollout:
        """``rollout`` with ``ids`` in place of its own answer, and the student's end of text where that is whole."""
        if is_whole:
            ids = (*ids, int(self._tokenizer.eos_token_id))
        ids = ids[: self._max_seq_len - len(rollout.prompt.token_ids)]
        return replace(rollout, token_ids=ids, origin="teacher", finish_reason="stop" if is_whole else "length")
