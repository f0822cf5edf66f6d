"""What a run tells whoever is watching it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Budget:
    """Where a run stands. ``done`` and ``total`` are response tokens of the current phase's budget."""

    phase: str
    done: int
    total: int
    step: int
    planned_steps: int
    elapsed: float  # seconds, all sessions of this run together


class Progress(Protocol):
    """A watcher. Every method returns at once and never raises into the run."""

    def activity(self, name: str, detail: str = "") -> None:
        """The run has turned to something else: loading, sampling, scoring, training, evaluating, saving."""

    def advance(self, metrics: Mapping[str, Any], budget: Budget) -> None:
        """One optimizer step is done; ``metrics`` is its line in metrics.jsonl."""

    def evaluated(self, result: Mapping[str, Any]) -> None:
        """One evaluation is done; ``result`` is its line in evals.jsonl."""

    def note(self, text: str) -> None:
        """Something a person should read."""


class Silent:
    """A `Progress` that nobody watches."""

    def activity(self, name: str, detail: str = "") -> None: ...
    def advance(self, metrics: Mapping[str, Any], budget: Budget) -> None: ...
    def evaluated(self, result: Mapping[str, Any]) -> None: ...
    def note(self, text: str) -> None: ...
