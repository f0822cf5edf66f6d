"""A process that asks a teacher through a cache, for tests that kill it. Every answer that is paid is a line of a log.

``python -m tests.cache_worker CACHE LOG ROLLOUTS SEED SECONDS_A_CALL``
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np

from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec
from tests.faults import assert_nothing_lost, make_rollouts, stream

VOCAB = 97
WANT = SignalSpec("topk", 1.3, 8)


class PaidTeacher:
    """A teacher whose every answer costs something, written down before it is handed over."""

    def __init__(self, backend: FakeBackend, log: Path) -> None:
        self.info = backend.info
        self.paid = 0
        self._teacher = LocalTeacher(backend, batch_tokens=64)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        async for scored in self._teacher.score(rollouts, want):
            self._pay(scored.rollout.rollout_id)
            yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        async for completion in self._teacher.complete(prompts, sampling):
            self._pay(completion.prompt.prompt_id)
            yield completion

    async def close(self) -> None:
        os.close(self._log)
        await self._teacher.close()

    def _pay(self, name: str) -> None:
        self.paid += 1
        os.write(self._log, f"{name}\n".encode())


async def main(cache: str, log: str, count: int, seed: int, delay: float) -> None:
    backend = FakeBackend(VOCAB, delay=delay)
    rollouts = make_rollouts(count, VOCAB)
    order = np.random.default_rng(seed).permutation(count)
    teacher = PaidTeacher(backend, Path(log))
    cached = CachedTeacher(teacher, AnswerStore(cache))
    print("asking", flush=True)
    scored = [item async for item in cached.score(stream([rollouts[at] for at in order]), WANT)]
    assert_nothing_lost(backend, rollouts, scored, WANT)
    await cached.close()
    await teacher.close()
    print("done", flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), float(sys.argv[5])))
