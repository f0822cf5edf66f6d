"""A small real language model for tests: next-token logits from a seeded random table, with knobs for what can go wrong.

Shape suffixes: ``V`` vocabulary, ``L`` response tokens of one rollout, ``R`` table rows.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from bbopd.errors import TeacherError
from bbopd.rpc.signals import signal_from_logits
from bbopd.teachers.local import LocalTeacher
from bbopd.types import LEVELS, Completion, FinishReason, Level, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["FakeBackend", "FakeTeacher"]

_ROWS = 127


class FakeBackend:
    """A language model whose logits are a row of a random table, chosen by the last two tokens.

    Parameters
    ----------
    vocab_size, seed : V, and which table.
    sharpness : standard deviation of the logits.
    levels, max_top_k, max_sequence_tokens, vocab_sha256 : what it says of itself.
    delay : seconds every call takes.
    nan_ids : rollouts whose signal holds a NaN.
    failures : how often a rollout makes the call fail, by its id.
    die_after : rollouts after which every call fails.
    """

    def __init__(
        self,
        vocab_size: int = 64,
        seed: int = 0,
        *,
        sharpness: float = 2.0,
        levels: Collection[Level] = LEVELS,
        max_top_k: int = 1024,
        max_sequence_tokens: int = 4096,
        vocab_sha256: str = "",
        delay: float = 0.0,
        nan_ids: Collection[str] = (),
        failures: Mapping[str, int] | None = None,
        die_after: int | None = None,
    ) -> None:
        self.info = TeacherInfo(
            model=f"fake-{vocab_size}-{seed}",
            vocab_size=vocab_size,
            offers=tuple(Offer(level, max_top_k if level in ("topk", "candidates") else 0, 0.01, 100.0) for level in levels),
            vocab_sha256=vocab_sha256,
            max_sequence_tokens=max_sequence_tokens,
        )
        self.calls: list[int] = []
        """Items of every call so far."""
        self._table_RV = (np.random.default_rng(seed).standard_normal((_ROWS, vocab_size)) * sharpness).astype(np.float32)
        self._delay = delay
        self._nan_ids = frozenset(nan_ids)
        self._failures = dict(failures or {})
        self._die_after = die_after
        self._scored = 0
        self._lock = threading.Lock()

    def logits(self, rollout: Rollout) -> np.ndarray:
        """Raw logits [L, V] float32 of every response token."""
        ids = np.array((0, *rollout.all_ids), np.int64)  # the 0 stands before the first token
        start = len(rollout.prompt.token_ids)
        return self._table_RV[self._row(ids[start:-1], ids[start - 1 : -2])]

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        self._begin(len(rollouts))
        for rollout in rollouts:
            if self._failures.get(rollout.rollout_id, 0) > 0:
                self._failures[rollout.rollout_id] -= 1
                raise RuntimeError(f"cannot score {rollout.rollout_id}")
        self._scored += len(rollouts)
        if self._die_after is not None and self._scored > self._die_after:
            raise TeacherError(f"fake teacher died after {self._die_after} rollouts")
        return [self._signal(rollout, want) for rollout in rollouts]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        self._begin(len(prompts))
        return [self._write(prompt, sampling) for prompt in prompts]

    def _begin(self, count: int) -> None:
        assert self._lock.acquire(blocking=False), "a backend is called by one thread at a time"
        try:
            self.calls.append(count)
            time.sleep(self._delay)
        finally:
            self._lock.release()

    def _row(self, last: np.ndarray, before: np.ndarray) -> np.ndarray:
        return (last * 31 + before * 17 + 7) % _ROWS

    def _signal(self, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
        logits = self.logits(rollout)
        if rollout.rollout_id in self._nan_ids:
            logits[-1, -1] = np.nan
        return signal_from_logits(logits, rollout, want)

    def _write(self, prompt: Prompt, sampling: Sampling) -> Completion:
        """Sample from the table; seeded by the prompt too, so that the batch does not matter."""
        random = np.random.default_rng([sampling.seed, zlib.crc32(np.array(prompt.token_ids, np.int32).tobytes())])
        ids = [0, *prompt.token_ids]
        answer: list[int] = []
        own: list[float] = []
        reason: FinishReason = "length"
        while len(answer) < sampling.max_new_tokens:
            row = self._row(np.array(ids[-1]), np.array(ids[-2]))
            logprobs = _log_softmax(self._table_RV[row].astype(np.float64)[None] / sampling.temperature)[0]
            token = int(logprobs.argmax() if sampling.top_k == 1 else random.choice(len(logprobs), p=np.exp(logprobs)))
            ids.append(token)
            answer.append(token)
            own.append(float(np.float32(logprobs[token])))  # as it travels
            if token in sampling.stop_token_ids:
                reason = "stop"
                break
        return Completion(prompt, tuple(answer), " ".join(map(str, answer)), reason, tuple(own))


class FakeTeacher(LocalTeacher):
    """A `FakeBackend` as a teacher in this process; arguments as for that."""

    def __init__(self, backend: FakeBackend) -> None:
        super().__init__(backend, batch_tokens=512)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
