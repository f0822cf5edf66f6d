"""Waiting for what is going to happen, however slow the machine is just now; and a teacher that is slow for as long as a test wants."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from bbopd.rpc.server import RunningServer
from bbopd.teachers.fake import FakeBackend

PATIENCE = 60.0
"""Seconds after which what a test waits for counts as never coming: far more than a machine with other work takes."""


async def until(is_true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Let the event loop run until ``is_true``. Raises AssertionError where it is not within ``seconds``."""
    for _ in _tries(is_true, seconds):
        await asyncio.sleep(0.01)


def wait_until(is_true: Callable[[], Any], seconds: float = PATIENCE) -> None:
    """Block this thread until ``is_true``. Raises AssertionError where it is not within ``seconds``."""
    for _ in _tries(is_true, seconds):
        time.sleep(0.01)


def _tries(is_true: Callable[[], Any], seconds: float) -> Iterator[None]:
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain"
        yield


class HeldBackend(FakeBackend):
    """A `FakeBackend` whose calls wait inside the model, once counted in ``calls``, until `go_on`."""

    def __init__(self, vocab_size: int = 64, **options: Any) -> None:
        super().__init__(vocab_size, **options)
        self._may_go = threading.Event()

    def go_on(self) -> None:
        """Let the calls that wait, and all later ones, be answered."""
        self._may_go.set()

    def _begin(self, count: int) -> None:
        super()._begin(count)
        assert self._may_go.wait(PATIENCE), f"held for {PATIENCE:g} s: call go_on"


def open_calls(server: RunningServer, kind: str) -> int:
    """How many calls of a ``kind``, "score" or "generate", a server has open; those that ended have given back what they had."""
    return int(server.observer.registry.get_sample_value("bbopd_open_calls", {"kind": kind}) or 0)
