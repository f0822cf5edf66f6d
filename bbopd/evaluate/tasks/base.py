"""What every task is: a name, where it came from, and scores of a model on its items."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from bbopd.evaluate.scores import Scores
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """What a result says of its task. ``sha256`` is over the task's file and its data, as they were read."""

    name: str
    kind: str
    source: str
    sha256: str
    items: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """``scores`` by metric; ``notes`` are counts and texts for a reader."""

    scores: Mapping[str, Scores]
    notes: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """Made once from its files, then asked about one model after another."""

    @property
    def info(self) -> TaskInfo: ...

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `ModelError` for a model that answers nothing, and what the engine raises."""
        ...
