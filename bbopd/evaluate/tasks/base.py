"""What every task is: a name, where it came from, and scores of a model on its items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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


@dataclass(frozen=True, slots=True)
class Room:
    """``longest``: tokens of the longest item, prompt and answer together; ``room``: what the model takes; ``too_long``: items beyond it,
    which lose the beginning of their prompt."""

    longest: int
    room: int
    too_long: int

    @classmethod
    def of(cls, lengths: Iterable[int], room: int) -> Room:
        known = list(lengths)
        return cls(max(known), room, sum(length > room for length in known))


class Task(Protocol):
    """Made once from its files, then asked about one model after another."""

    @property
    def info(self) -> TaskInfo: ...

    def check_room(self, subject: Subject) -> Room | None:
        """Tokens of the longest item, and how many have no room in ``subject``, without asking it anything; None where it is not known.

        Raises `DataError` for an item that cannot be asked at all.
        """
        ...

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `ModelError` for a model that answers nothing, and what the engine raises."""
        ...
