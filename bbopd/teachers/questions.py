"""The questions that a cache knows: each by the hash of all that could change its answer, and its answers as bytes.

Shape suffixes: ``L`` response tokens, ``V`` vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from typing import Any, Protocol, TypeVar

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from bbopd.rpc.codec import input_sha256
from bbopd.rpc.limits import check_prompt, check_rollout
from bbopd.rpc.signals import check_signal, signal_temperature
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["Questions", "ScoringQuestions", "WritingQuestions"]

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Questions(Protocol[Item, Answer]):
    """One kind of question, all of one pass: ``Item`` is what is asked about."""

    kind: str

    def check(self, item: Item, /) -> None: ...
    def key(self, item: Item, /) -> bytes: ...
    def describe(self, item: Item, /) -> tuple[str, int]: ...
    def subject(self, answer: Answer, /) -> Item: ...
    def answer_to(self, item: Item, answer: Answer, /) -> Answer: ...
    def encode(self, answer: Answer, /) -> bytes: ...
    def decode(self, item: Item, data: bytes, /) -> Answer: ...


class ScoringQuestions:
    """Questions of the form: what do you think of this rollout?"""

    def __init__(self, info: TeacherInfo, want: SignalSpec) -> None:
        self.kind: str = want.level
        self._info = info
        self._want = want
        self._identity = _identity(info, ["score", want.level, want.top_k, signal_temperature(want)])

    def check(self, rollout: Rollout) -> None:
        check_rollout(rollout, self._want, self._info)

    def key(self, rollout: Rollout) -> bytes:
        return hashlib.sha256(self._identity + input_sha256(rollout, self._want)).digest()

    def describe(self, rollout: Rollout) -> tuple[str, int]:
        return rollout.rollout_id, len(rollout.all_ids)

    def subject(self, answer: ScoredRollout) -> Rollout:
        return answer.rollout

    def answer_to(self, rollout: Rollout, answer: ScoredRollout) -> ScoredRollout:
        return ScoredRollout(rollout, answer.signal)

    def encode(self, answer: ScoredRollout) -> bytes:
        """The arrays as they are (a second rounding would change the run), ids as uint16 where they fit."""
        signal = answer.signal
        arrays = {
            name: np.ascontiguousarray(array)
            for name in ("logits", "ids", "logprobs", "log_tail", "sampled")
            if (array := getattr(signal, name)) is not None
        }
        if signal.level == "candidates":
            del arrays["ids"]  # they are part of the question
        elif "ids" in arrays and self._info.vocab_size <= 2**16:
            arrays["ids"] = arrays["ids"].astype(np.uint16)
        return save_arrays(arrays)

    def decode(self, rollout: Rollout, data: bytes) -> ScoredRollout:
        """Raises `ValueError` for what is no answer to this question."""
        try:
            arrays = load_arrays(data)
        except SafetensorError as error:
            raise ValueError(str(error)) from None
        if self._want.level == "candidates":
            arrays["ids"] = np.ascontiguousarray(rollout.candidate_ids, np.int32)
        elif "ids" in arrays:
            arrays["ids"] = arrays["ids"].astype(np.int32)
        try:
            signal = TeacherSignal(self._want.level, signal_temperature(self._want), **arrays)
        except TypeError as error:
            raise ValueError(str(error)) from None
        check_signal(signal, self._want, np.array(rollout.token_ids, np.int32), self._info.vocab_size)
        return ScoredRollout(rollout, signal)


class WritingQuestions:
    """Questions of the form: what would you write here?"""

    kind = "text"

    def __init__(self, info: TeacherInfo, sampling: Sampling) -> None:
        self._info = info
        self._sampling = sampling
        self._identity = _identity(info, ["complete", asdict(sampling)])

    def check(self, prompt: Prompt) -> None:
        check_prompt(prompt, self._sampling, self._info)

    def key(self, prompt: Prompt) -> bytes:
        asked = json.dumps([prompt.text, prompt.messages]).encode() if prompt.is_text else np.array(prompt.token_ids, "<i4").tobytes()
        return hashlib.sha256(self._identity + asked).digest()

    def describe(self, prompt: Prompt) -> tuple[str, int]:
        return prompt.prompt_id, len(prompt.token_ids) + self._sampling.max_new_tokens

    def subject(self, answer: Completion) -> Prompt:
        return answer.prompt

    def answer_to(self, prompt: Prompt, answer: Completion) -> Completion:
        return replace(answer, prompt=prompt)

    def encode(self, answer: Completion) -> bytes:
        return json.dumps([answer.token_ids, answer.text, answer.finish_reason, answer.logprobs]).encode()

    def decode(self, prompt: Prompt, data: bytes) -> Completion:
        ids, text, finish_reason, *logprobs = json.loads(data)  # older ones have none
        return Completion(prompt, tuple(ids), text, finish_reason, tuple(*logprobs))


def _identity(info: TeacherInfo, asked: list[Any]) -> bytes:
    """The part of a key that all questions of one pass share."""
    who = [info.model, info.revision, info.weights_version, info.vocab_size, info.vocab_sha256]
    return hashlib.sha256(json.dumps([who, asked], sort_keys=True).encode()).digest()
