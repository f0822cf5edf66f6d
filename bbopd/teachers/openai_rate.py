"""A client's own rate limits, so that a server need not say 429: requests and tokens in a minute, as two token buckets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

__all__ = ["RateLimits"]

_BURST_SECONDS = 6.0  # of the minute's rate may go at once; providers count windows shorter than a minute too


class _Bucket:
    """``per_minute`` flows in; a request takes its amount out, into debt where it is more than a burst."""

    def __init__(self, per_minute: float, now: float) -> None:
        self._per_second = per_minute / 60.0
        self._size = max(1.0, self._per_second * _BURST_SECONDS)
        self._level = self._size
        self._filled_at = now

    def take(self, amount: float, now: float) -> float:
        """Take ``amount`` out. Returns the seconds after which it may be used."""
        self._level = min(self._size, self._level + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        needed = min(amount, self._size)  # more than a full bucket waits for a full one, and those after it for the debt
        wait = max(0.0, (needed - self._level) / self._per_second)
        self._level -= amount
        return wait


class RateLimits:
    """None limits nothing. ``clock``: seconds, rising.

    Whatever moment is looked at, the requests (tokens) let through in the minute before it are at most the minute's rate and a tenth
    of it more, and one request of any size.
    """

    def __init__(
        self,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        now = clock()
        self._requests = _Bucket(requests_per_minute, now) if requests_per_minute else None
        self._tokens = _Bucket(tokens_per_minute, now) if tokens_per_minute else None

    def take(self, tokens: int) -> float:
        """Take one request of so many tokens out. Returns the seconds after which it may be made."""
        now = self._clock()
        waits = [bucket.take(amount, now) for bucket, amount in ((self._requests, 1.0), (self._tokens, float(tokens))) if bucket]
        return max(waits, default=0.0)

    async def wait(self, tokens: int) -> None:
        """Until a request of so many tokens may be made, in the order of asking."""
        if (seconds := self.take(tokens)) > 0:
            await asyncio.sleep(seconds)
