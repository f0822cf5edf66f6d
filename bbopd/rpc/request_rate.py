"""Requests a second of one client: who asks more often is refused, and told when to ask again."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["RequestRate"]

_BURST = 1.0  # seconds' worth of requests that may come at once
_FORGOTTEN_FROM = 1024  # clients


class RequestRate:
    """The generic cell rate algorithm (a token bucket that keeps one number a client): ITU-T I.371, appendix I.

    A client is remembered until its bucket is full again, also where it has no call open: leaving resets nothing.

    Parameters
    ----------
    per_second : requests of one client, in the long run; one second's worth, at least one, may come at once. None: any number.
    clock : seconds, rising.
    """

    def __init__(self, per_second: float | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_second = per_second
        self._clock = clock
        self._due: dict[str, float] = {}  # when the bucket of a client will be full again
        self._forgets_at = _FORGOTTEN_FROM

    def __len__(self) -> int:
        return len(self._due)

    def take(self, name: str) -> float:
        """Count one request of the client ``name``: 0 where it may be made, else the seconds after which it may."""
        if self.per_second is None:
            return 0.0
        now, gap = self._clock(), 1.0 / self.per_second
        due = max(now, self._due.get(name, now)) + gap
        wait = due - now - max(_BURST, gap)
        if wait > 1e-9:
            return wait
        self._due[name] = due
        if len(self._due) >= self._forgets_at:
            self._due = {name: due for name, due in self._due.items() if due > now}
            self._forgets_at = max(_FORGOTTEN_FROM, 2 * len(self._due))
        return 0.0
