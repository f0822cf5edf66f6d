"""A teacher with tokens of its own, as a student with others sees it: asked about its own tokens of the same text, heard by aligned spans.

Shape suffixes: ``L`` response tokens of the student's, ``G`` aligned groups, ``K`` ids a token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from bbopd.alignment import align_tokens
from bbopd.errors import BadAnswerError, TeacherError
from bbopd.modeling.spelling import Speller, counterparts
from bbopd.reference_math import LOG_P_FLOOR
from bbopd.rpc.signals import with_sampled
from bbopd.teachers.prompt_ids import prompt_ids
from bbopd.types import (
    ALIGNED_ID,
    ALIGNED_RANK,
    ALIGNED_SPAN,
    Completion,
    Prompt,
    Rollout,
    Sampling,
    ScoredRollout,
    SignalSpec,
    Teacher,
    TeacherSignal,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Aligned", "AligningTeacher"]

_LONGEST_CHARACTER = 4  # bytes


@dataclass(frozen=True, slots=True, eq=False)
class Aligned:
    """A rollout as the teacher is asked about it, and which tokens of both have the same bytes."""

    question: Rollout
    ends: np.ndarray  # [G + 1, 2]: where each group ends, in response tokens of the student's and of the teacher's


class AligningTeacher:
    """The `Teacher` protocol in the student's tokens, over a teacher with others.

    Parameters
    ----------
    teacher : asked with its own ids; it must offer ``topk``.
    theirs, ours : what the teacher's tokens spell, and the student's.
    tokenizer : the teacher's, which writes prompts down by its own chat template.
    """

    def __init__(self, teacher: Teacher, theirs: Speller, ours: Speller, tokenizer: PreTrainedTokenizerBase) -> None:
        self.info = teacher.info
        self._teacher = teacher
        self._theirs, self._ours = theirs, ours
        self._tokenizer = tokenizer
        self._counterparts = counterparts(theirs, ours)
        limits = [limit for limit in (self.info.max_sequence_tokens, self.info.max_request_tokens) if limit]
        self._longest = min(limits, default=0)

    @property
    def common_ids(self) -> int:
        """How many of the teacher's ids stand for what an id of the student's stands for."""
        return int((self._counterparts >= 0).sum())

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raises `TeacherError` where a prompt leaves no room for an answer within what the teacher takes, or cannot be written down."""
        first_chat = next((prompt for prompt in prompts if prompt.messages), None)
        for prompt in prompts:
            has_room = not self._longest or (not prompt.messages and self._most_tokens(prompt) < self._longest)
            if not has_room or prompt is first_chat:
                self._room(prompt, self._question(prompt, ())[0])

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Each of ``rollouts`` with the teacher's signal, row by row of its own tokens (see `TeacherSignal.rows`).

        Raises `TeacherError` as the teacher itself does, and for a prompt that leaves no room for an answer.
        """
        assert want.level == "topk"
        asked: dict[str, tuple[Rollout, Aligned]] = {}

        async def questions() -> AsyncIterator[Rollout]:
            async for rollout in rollouts:
                aligned = self.align(rollout)
                asked[rollout.rollout_id] = rollout, aligned
                yield aligned.question

        async with aclosing(self._teacher.score(questions(), want)) as answers:  # type: ignore[type-var]
            async for scored in answers:
                rollout, aligned = asked.pop(scored.rollout.rollout_id)
                yield ScoredRollout(rollout, self._in_our_tokens(rollout, aligned, scored.signal))

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own."""
        async with aclosing(self._teacher.complete(prompts, sampling)) as answers:  # type: ignore[type-var]
            async for completion in answers:
                yield completion

    def align(self, rollout: Rollout) -> Aligned:
        """The rollout's prompt and answer in the teacher's tokens, side by side with the student's.

        The answer is its text up to the first token that is none (a special token, bytes of no character), then the teacher's own end. An
        answer too long for the teacher is cut there. Raises `TeacherError` where the prompt alone is too long.
        """
        has_end = rollout.finish_reason != "length" and self._ours.vocabulary[rollout.token_ids[-1]] is None
        written = rollout.token_ids[: len(rollout) - has_end]
        asked, skipped = self._question(rollout.prompt, written)
        room = self._room(rollout.prompt, asked)
        end = self._theirs.end_of_turn if rollout.prompt.messages else self._theirs.end
        text = self._theirs.encode(self._text(written[skipped:]))[:room]
        answer = [*text, end][:room]
        ends = align_tokens(written[skipped:], self._ours.vocabulary, text, self._theirs.vocabulary) + np.array([skipped, 0])
        if has_end and len(answer) > len(text) and ends[-1].tolist() == [len(written), len(text)]:
            ends = np.vstack([ends, ends[-1:] + 1])  # both say that it ends here
        prompt = Prompt(rollout.prompt.prompt_id, tuple(asked))
        return Aligned(replace(rollout, prompt=prompt, token_ids=tuple(answer), logprobs=None), ends)

    def _question(self, prompt: Prompt, written: Sequence[int]) -> tuple[Sequence[int], int]:
        """The prompt in the teacher's ids; how many tokens of the answer only complete a character that the prompt begins."""
        skipped = 0
        if not (prompt.text or prompt.messages):
            raw = self._ours.bytes_of(prompt.token_ids)
            while skipped < min(_LONGEST_CHARACTER, len(written)) and _is_cut(raw):
                raw += self._ours.bytes_of(written[skipped : skipped + 1])
                skipped += 1
            prompt = replace(prompt, text=raw.decode(errors="ignore"))
        return prompt_ids(prompt, self._tokenizer, self.info.model) or (self._theirs.end,), skipped

    def _room(self, prompt: Prompt, asked: Sequence[int]) -> int | None:
        """How many tokens an answer to ``asked`` may have; None for any number."""
        if self._longest and len(asked) >= self._longest:
            raise TeacherError(
                f"prompt {prompt.prompt_id} has {len(asked)} of the teacher's tokens, and teacher {self.info.model} takes {self._longest}, "
                "the answer included: shorten or drop it, or lower data.prompt_tokens"
            )
        return self._longest - len(asked) if self._longest else None

    def _most_tokens(self, prompt: Prompt) -> int:
        """A token has at least one byte; some stand around a text."""
        return 16 + len(prompt.text.encode() if prompt.text else self._ours.bytes_of(prompt.token_ids))

    def _text(self, body: Sequence[int]) -> str:
        pieces = []
        for index in body:
            raw = self._ours.vocabulary[index]
            if raw is None:
                break
            pieces.append(raw)
        return _decoded(b"".join(pieces))

    def _in_our_tokens(self, rollout: Rollout, aligned: Aligned, signal: TeacherSignal) -> TeacherSignal:
        ranked, sampled = signal, signal.sampled
        signal = with_sampled(signal, aligned.question.token_ids)
        ids, logprobs, log_tail = signal.ids, signal.logprobs, signal.log_tail
        if ids is None or logprobs is None or log_tail is None or sampled is None or ranked.logprobs is None or ranked.log_tail is None:
            raise BadAnswerError(f"rollout {rollout.rollout_id}: teacher {self.info.model} gave no top-k signal")
        L, K = len(rollout), ids.shape[1]
        ends, sizes = aligned.ends, np.diff(aligned.ends, axis=0)
        is_single = (sizes == 1).all(axis=1)
        starts = ends[:-1]
        rows_L = np.zeros(L, np.uint8)
        ours, theirs = starts[is_single, 0], starts[is_single, 1]
        if ends[-1, 0] < L and ends[-1, 1] < len(ids):  # the same text before it: what comes next can be compared, whatever it was
            ours, theirs = np.append(ours, ends[-1, 0]), np.append(theirs, ends[-1, 1])
        rows_L[ours] = ALIGNED_ID
        ids_LK, logprobs_LK = np.full((L, K), -1, np.int32), np.full((L, K), -np.inf, np.float32)
        log_tail_L, advantages_L = np.zeros(L, np.float32), np.zeros(L, np.float32)
        ids_LK[ours], logprobs_LK[ours], log_tail_L[ours] = renumber(ids[theirs], logprobs[theirs], log_tail[theirs], self._counterparts)
        ours, theirs = starts[~is_single, 0], starts[~is_single, 1]
        rows_L[ours] |= ALIGNED_RANK
        logprobs_LK[ours, : ranked.logprobs.shape[1]] = -np.sort(-ranked.logprobs[theirs], axis=1)  # of the likeliest alone
        log_tail_L[ours] = ranked.log_tail[theirs]
        if rollout.logprobs is not None and not rollout.is_labelled:
            gain_G = _sums(np.maximum(sampled, LOG_P_FLOOR), ends[:, 1]) - _sums(rollout.logprobs, ends[:, 0])
            for group in np.flatnonzero(~is_single):
                span = slice(ends[group, 0], ends[group + 1, 0])
                rows_L[span] |= ALIGNED_SPAN
                advantages_L[span] = gain_G[group]
        return TeacherSignal(
            "topk", signal.temperature, ids=ids_LK, logprobs=logprobs_LK, log_tail=log_tail_L, advantages=advantages_L, rows=rows_L
        )


def renumber(
    ids_LK: np.ndarray, logprobs_LK: np.ndarray, log_tail_L: np.ndarray, counterparts: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A top-k signal under the ids of ``counterparts``: several ids of one counterpart add up, those without one go to the tail."""
    own_LK = np.where(ids_LK < 0, -1, counterparts[ids_LK])
    mass_LK = np.exp(logprobs_LK.astype(np.float64))
    is_kept = own_LK >= 0
    tail_L = np.exp(log_tail_L.astype(np.float64)) + np.where(is_kept, 0, mass_LK).sum(axis=1)
    order_LK = np.argsort(own_LK, axis=1, kind="stable")
    sorted_LK = np.take_along_axis(own_LK, order_LK, 1)
    for row, column in np.argwhere((np.diff(sorted_LK, axis=1) == 0) & (sorted_LK[:, 1:] >= 0)):
        first, again = order_LK[row, column], order_LK[row, column + 1]
        mass_LK[row, again] += mass_LK[row, first]
        own_LK[row, first] = -1
    is_kept = own_LK >= 0
    with np.errstate(divide="ignore"):
        logprobs_LK = np.where(is_kept, np.log(mass_LK), -np.inf)
        return own_LK.astype(np.int32), logprobs_LK.astype(np.float32), np.log(tail_L).astype(np.float32)


def _sums(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Sums of ``values`` between neighbouring ``ends``."""
    before = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    return np.diff(before[ends])


def _decoded(raw: bytes) -> str:
    """Text up to the first byte of no character."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


def _is_cut(raw: bytes) -> bool:
    """Whether it ends within a character."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return False
