"""The seam under the server: what a model must be able to do to be served as a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol, runtime_checkable

from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["TeacherBackend", "TextBackend", "with_ids"]


class TeacherBackend(Protocol):
    """A model behind a teacher. Calls come one at a time, from a thread that is not the event loop's."""

    info: TeacherInfo

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        """One signal per rollout, in the same order. All of them are already known to be within ``info``'s limits."""
        ...

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        """One answer per prompt, in the same order."""
        ...


@runtime_checkable
class TextBackend(Protocol):
    """What a backend has beside that where its ``info.takes_text``."""

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """The ids of a prompt that is text or messages; called on the event loop. Raises `RefusedError` for what it cannot read."""
        ...


def with_ids(prompt: Prompt, backend: object) -> Prompt:
    """The prompt with its ids, made by the backend's own tokenizer where it came as text that `check_prompt` has passed."""
    if not prompt.is_text:
        return prompt
    assert isinstance(backend, TextBackend), "info.takes_text, so it does"
    return replace(prompt, token_ids=backend.encode(prompt))
