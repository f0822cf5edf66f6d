"""What the wire benchmark moves: rollouts, and the answers that a teacher of 128k entries would give to them, drawn beforehand.

Shape suffixes: ``L`` response tokens of one rollout, ``K`` top-k.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

VOCAB = 128_256
WANT = SignalSpec("topk", 1.0, 64)
_ROWS = 8192  # drawn; the answers are stretches of them
_LENGTHS = (128, 385)  # of responses
_PROMPTS = (32, 97)


class Load:
    """Rollouts ``0, 1, …`` of 128 to 384 response tokens, whose answers are known; the same in every process.

    About every second response token is among the teacher's ids, as in a student's own text many are.
    """

    def __init__(self) -> None:
        random = np.random.default_rng(0)
        self._numbers = itertools.count()
        K = WANT.top_k
        self._ids = np.stack([random.choice(VOCAB, K, replace=False) for _ in range(_ROWS)]).astype(np.int32)
        weights = -np.sort(-(random.standard_exponential((_ROWS, K + 1)) ** 4), axis=1)
        logprobs = np.log(weights / weights.sum(axis=1, keepdims=True))
        self._logprobs = np.ascontiguousarray(logprobs[:, :K], np.float32)
        self._log_tail = np.ascontiguousarray(logprobs[:, K], np.float32)
        at = random.integers(0, 2 * K, _ROWS)
        is_among, row = at < K, np.arange(_ROWS)
        others = (self._ids[:, 0] + random.integers(1, VOCAB, _ROWS)) % VOCAB
        is_among |= (self._ids == others[:, None]).any(axis=1)
        self._tokens = np.where(is_among, self._ids[row, at % K], others).tolist()
        self._sampled = np.where(is_among, self._logprobs[row, at % K], self._log_tail - 1).astype(np.float32)
        self._stretches = list(zip(random.integers(0, _ROWS - _LENGTHS[1], 4096), random.integers(*_LENGTHS, 4096), strict=True))
        self._prompts = [tuple(random.integers(0, VOCAB, length).tolist()) for length in random.integers(*_PROMPTS, 4096)]

    def rollouts(self, tokens: int) -> list[Rollout]:
        """As many as have ``tokens`` response tokens together, about; new ones each time, as no server need answer the same one again."""
        made: list[Rollout] = []
        while tokens > 0:
            number = next(self._numbers)
            start, length = self._stretches[number % len(self._stretches)]
            prompt = Prompt(f"p{number}", (number % VOCAB, *self._prompts[number % len(self._prompts)]))  # no two alike
            made.append(Rollout(str(number), prompt, tuple(self._tokens[start : start + length])))
            tokens -= length
        return made
        return made

    def answer(self, rollout_id: str) -> TeacherSignal:
        start, length = self._stretches[int(rollout_id) % len(self._stretches)]
        rows = slice(start, start + length)
        return TeacherSignal(
            WANT.level,
            WANT.temperature,
            ids=self._ids[rows],
            logprobs=self._logprobs[rows],
            log_tail=self._log_tail[rows],
            sampled=self._sampled[rows],
        )


class InstantBackend:
    """A `TeacherBackend` that has every answer ready."""

    def __init__(self, load: Load) -> None:
        self.info = TeacherInfo("instant", VOCAB, (Offer("topk", WANT.top_k),), max_sequence_tokens=4096)
        self._load = load

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        return [self._load.answer(rollout.rollout_id) for rollout in rollouts]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        raise NotImplementedError("level text is not offered")
