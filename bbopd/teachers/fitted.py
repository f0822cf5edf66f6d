"""A teacher whose head is padded beyond the tokens, as the student sees it: with a distribution over the tokens alone.

Shape suffixes: ``L`` response tokens, ``V`` vocabulary, ``K`` ids a token.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace

import numpy as np

from bbopd.errors import BadAnswerError
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher, TeacherSignal

__all__ = ["FittedTeacher", "fitted", "without_padding"]


class FittedTeacher:
    """The `Teacher` protocol over another one, of whose ids the first ``vocab_size`` are tokens."""

    def __init__(self, teacher: Teacher, vocab_size: int) -> None:
        self.info = replace(teacher.info, vocab_size=vocab_size)
        self._teacher = teacher

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """As the teacher's own. Raises `BadAnswerError` where it gives padding all its mass."""
        async with aclosing(self._teacher.score(rollouts, want)) as answers:  # type: ignore[type-var]
            async for scored in answers:
                try:
                    signal = without_padding(scored.signal, self.info.vocab_size)
                except ValueError as error:
                    raise BadAnswerError(f"rollout {scored.rollout.rollout_id}: teacher {self.info.model} {error}") from None
                yield ScoredRollout(scored.rollout, signal)

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own."""
        async with aclosing(self._teacher.complete(prompts, sampling)) as answers:  # type: ignore[type-var]
            async for completion in answers:
                yield completion


def fitted(teacher: Teacher, vocab_size: int) -> Teacher:
    """``teacher``, of whose ids the first ``vocab_size`` are tokens; itself where it has no others."""
    return teacher if teacher.info.vocab_size <= vocab_size else FittedTeacher(teacher, vocab_size)


def without_padding(signal: TeacherSignal, vocab_size: int) -> TeacherSignal:
    """The signal's distribution given that the token is one: ids from ``vocab_size`` on have no mass, the rest has all of it.

    Exact at ``full``. At ``topk`` what the K ids hold of padding is known and leaves; what the tail holds of it stays there. Raises
    `ValueError` where nothing is left.
    """
    if signal.logits is not None:
        return replace(signal, logits=signal.logits[:, :vocab_size])
    if signal.level != "topk" or signal.ids is None or signal.logprobs is None or signal.log_tail is None or signal.sampled is None:
        return signal  # at ids that the student chose, which are tokens
    is_padding = signal.ids >= vocab_size
    if not is_padding.any():
        return signal
    kept_LK = np.where(is_padding, -np.inf, signal.logprobs.astype(np.float64))
    left_L = np.exp(kept_LK).sum(axis=1) + np.exp(signal.log_tail.astype(np.float64))
    if not (left_L > 0).all():
        raise ValueError(f"gives all its mass to ids beyond the {vocab_size} tokens: serve it with its tokenizer")
    log_left_L = np.log(left_L)
    return replace(
        signal,
        ids=np.where(is_padding, -1, signal.ids),
        logprobs=(kept_LK - log_left_L[:, None]).astype(np.float32),
        log_tail=(signal.log_tail - log_left_L).astype(np.float32),
        sampled=(signal.sampled - log_left_L).astype(np.float32),
    )
