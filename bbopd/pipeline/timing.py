"""Where the time goes: every second of a run belongs to one activity."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

Clock = Callable[[], float]  # seconds, monotonic


class Timeline:
    """Seconds by activity. Activities may nest: the inner one takes its seconds from the outer."""

    def __init__(self, clock: Clock = time.monotonic, seconds: Mapping[str, float] | None = None) -> None:
        self._clock = clock
        self._seconds = dict(seconds or {})
        self._stack: list[str] = []
        self._since = clock()

    @contextmanager
    def activity(self, name: str) -> Iterator[None]:
        self._settle()
        self._stack.append(name)
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def add(self, name: str, seconds: float) -> None:
        """Book seconds that passed before the clock was there, such as starting the process."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self) -> dict[str, float]:
        self._settle()
        return dict(self._seconds)

    @property
    def elapsed(self) -> float:
        return sum(self.seconds().values())

    def _settle(self) -> None:
        now = self._clock()
        name = self._stack[-1] if self._stack else "other"
        self._seconds[name] = self._seconds.get(name, 0.0) + now - self._since
        self._since = now
