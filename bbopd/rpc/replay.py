"""Answers that were given, by the name their client gave the question: a question asked again is never run, nor paid for, twice."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

from bbopd.rpc.limits import RefusedError
from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherSignal

__all__ = ["ReplayStore", "body_sha256"]

_ENTRY_BYTES = 512  # of a name, a digest and their place in the table, about


def body_sha256(kind: SignalSpec | Sampling, payload: Rollout | Prompt, digest: bytes) -> bytes:
    """SHA-256 over all that decides an answer: what is asked, how, and of which tokens; ``digest`` is a rollout's `input_sha256`."""
    if isinstance(payload, Rollout):
        return hashlib.sha256(repr(kind).encode() + digest).digest()
    return hashlib.sha256(repr((kind, payload.token_ids)).encode()).digest()


@dataclass(frozen=True, slots=True)
class _Kept:
    body: bytes
    answer: TeacherSignal | Completion
    size: int


class ReplayStore:
    """Keeps the answers that were asked for last, up to ``capacity`` bytes of them, in memory."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._kept: OrderedDict[tuple[str, str], _Kept] = OrderedDict()

    def find(self, owner: str, replay_id: str, body: bytes) -> TeacherSignal | Completion | None:
        """The answer given before. Raises `RefusedError` where the name stood for another body then."""
        kept = self._kept.get((owner, replay_id))
        if kept is None:
            return None
        if kept.body != body:
            raise RefusedError(
                "mismatch", f"replay_id {replay_id} stood for another question before: give every question a name of its own"
            )
        self._kept.move_to_end((owner, replay_id))
        return kept.answer

    def keep(self, owner: str, replay_id: str, body: bytes, answer: TeacherSignal | Completion) -> None:
        """Keep an answer, at the cost of those not asked for the longest."""
        size = _ENTRY_BYTES + _answer_size(answer)
        self._forget((owner, replay_id))
        if size > self._capacity:
            return
        while self._size + size > self._capacity:
            self._forget(next(iter(self._kept)))
        self._kept[owner, replay_id] = _Kept(body, answer, size)
        self._size += size

    def _forget(self, key: tuple[str, str]) -> None:
        kept = self._kept.pop(key, None)
        if kept is not None:
            self._size -= kept.size


def _answer_size(answer: TeacherSignal | Completion) -> int:
    if isinstance(answer, Completion):
        return 40 * len(answer.token_ids) + 4 * len(answer.text)
    arrays = (answer.logits, answer.ids, answer.logprobs, answer.log_tail, answer.sampled)
    return sum(array.nbytes for array in arrays if array is not None)
