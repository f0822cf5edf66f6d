"""Judged answers with what a policy not to leave thinks of them beside their advantages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace

from bbopd.pipeline.cycle import as_generator
from bbopd.pipeline.parts import Scores
from bbopd.trainer.reference_policy import ReferencePolicy
from bbopd.types import Rollout, ScoredRollout, SignalSpec, Unscored


class ReferencedScores:
    """``scores``, and of every rollout with advantages the logprobs of ``reference``."""

    def __init__(self, scores: Scores, reference: ReferencePolicy) -> None:
        self._scores, self._reference = scores, reference

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncGenerator[ScoredRollout | Unscored, None]:
        """As ``scores`` gives them, and in that order."""
        async with aclosing(as_generator(self._scores.score(rollouts, want))) as answers:
            async for answer in answers:
                if isinstance(answer, Unscored) or answer.signal.advantages is None:
                    yield answer
                    continue
                (logprobs,) = self._reference.logprobs([answer.rollout])
                yield replace(answer, signal=replace(answer.signal, reference_logprobs=logprobs))
