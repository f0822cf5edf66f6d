"""Where a checkpoint's writing may be cut off: the points between one change of the disk and the next, each told as it is reached.

Whatever happens to the process at any of them, the checkpoint before, or the new one, is what ``latest`` names, and is whole. Tests kill a
process at each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

OF_ONE_PROCESS = ("begun", "model", "tokenizer", "moments", "beside", "state")
OF_RANKS = ("begun", "config", "shards copied", "state", "shards written")
OF_PUBLISHING = ("manifest", "synced", "renamed", "pointer", "latest", "old one set aside", "old one removed")
"""From what was written aside to what ``latest`` names: after ``latest`` it is the new one."""

_watchers: list[Callable[[str], None]] = []


def reached(point: str) -> None:
    """Tell whoever watches that ``point``, of those above, is behind."""
    for watch in _watchers:
        watch(point)


@contextmanager
def watched(watch: Callable[[str], None]) -> Iterator[None]:
    """Have ``watch`` told of every point that this process reaches, in the thread that does."""
    _watchers.append(watch)
    try:
        yield
    finally:
        _watchers.remove(watch)
