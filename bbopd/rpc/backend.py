"""The seam under the server: what a model must be able to do to be served as a teacher.

Shape suffixes: ``L`` response tokens of one rollout, ``M`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CandidateRollout", "TeacherBackend", "TextBackend", "with_ids"]


@dataclass(frozen=True, slots=True, eq=False)
class CandidateRollout(Rollout):
    """A rollout whose writer also chose the ids to be asked about, as level ``candidates`` needs.

    ``candidate_ids`` [L, M] int32; −1 is an empty slot, and no id comes twice in a row.
    """

    candidate_ids: np.ndarray | None = None


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
