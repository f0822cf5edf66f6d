"""How long to wait before asking again, and how often at all: retries must not become the load that keeps a teacher down."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable

__all__ = ["Health", "RetryBudget", "backoff"]

_FIRST = 0.1  # seconds
_LONGEST = 15.0  # seconds


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row (1 or more): doubled each time, up to 15, less a random part of up to half.

    The random part keeps many clients of a teacher that comes back from asking it all at once.
    """
    return min(_LONGEST, _FIRST * 2.0 ** min(failures - 1, 10)) * random.uniform(0.5, 1.0)


class Health:
    """How a server has behaved of late, and until when it is left alone. Times are those of the running event loop, in seconds."""

    def __init__(self) -> None:
        self.faults = 0
        """Failures since it last did what was asked."""
        self.trouble = ""
        """The last failure, in words."""
        self._rests_until = 0.0

    @property
    def rest_seconds(self) -> float:
        """How long it is still left alone; 0 where it may be asked."""
        return max(0.0, self._rests_until - asyncio.get_running_loop().time())

    def note_failure(self, trouble: str, retry_after: float = 0.0, *, since: int | None = None) -> None:
        """Leave it alone for a while: longer after every failure in a row, and at least as long as it asked for itself.

        ``since`` is what ``faults`` was when it was asked: many requests that fail together are one failure.
        """
        self.trouble = trouble
        if since is None or since == self.faults:
            self.faults += 1
            retry_after = max(retry_after, backoff(self.faults))
        self._rests_until = max(self._rests_until, asyncio.get_running_loop().time() + retry_after)

    def note_success(self) -> None:
        self.faults = 0


class RetryBudget:
    """A token bucket: in the long run, retries are at most ``share`` of the requests, and one every ``1 / per_second`` seconds.

    Parameters
    ----------
    share : what a fresh request adds to the bucket; a retry takes 1.
    reserve : retries in the bucket at first, and at most.
    per_second : what time adds, so that the last items of a run can still be asked again.
    clock : seconds, rising.
    """

    def __init__(
        self, share: float = 0.2, reserve: float = 20.0, per_second: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._share = share
        self._reserve = reserve
        self._per_second = per_second
        self._clock = clock
        self._balance = reserve
        self._filled_at = clock()

    def note_request(self) -> None:
        self._balance = min(self._reserve, self._balance + self._share)

    def take_retry(self) -> float:
        """Take one retry out, into debt where it must be. Returns the seconds after which it may be made."""
        now = self._clock()
        self._balance = min(self._reserve, self._balance + (now - self._filled_at) * self._per_second)
        self._filled_at = now
        self._balance -= 1.0
        return max(0.0, -self._balance / self._per_second)
