"""How much memory the C++ engine may use to be faster."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_limit: ContextVar[float | None] = ContextVar("stash_limit", default=None)


def stash_megabytes() -> float:
    """The limit in force: that of `stash_limit`, else ``BBOPD_CPU_STASH_MB``, else 256."""
    inner = _limit.get()
    if inner is not None:
        return inner
    text = os.environ.get("BBOPD_CPU_STASH_MB", "256")
    try:
        return _checked(float(text))
    except ValueError:
        raise ValueError(f"BBOPD_CPU_STASH_MB is {text!r}: it must be a number of megabytes, 0 or more") from None


@contextmanager
def stash_limit(megabytes: float) -> Iterator[None]:
    """Limit the logits that ``impl="cpu"`` keeps from its first pass, so that it need not multiply again; 0 keeps none.

    Raises
    ------
    ValueError
        ``megabytes`` is negative or no number.
    """
    token = _limit.set(_checked(megabytes))
    try:
        yield
    finally:
        _limit.reset(token)


def _checked(megabytes: float) -> float:
    if not 0 <= megabytes < float("inf"):
        raise ValueError(f"stash limit is {megabytes}: it must be a number of megabytes, 0 or more")
    return megabytes
