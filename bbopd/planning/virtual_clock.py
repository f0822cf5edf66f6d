"""An event loop on a clock of its own: nobody waits, time jumps to the next timer. Hours of a pipeline pass in seconds."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

Answer = TypeVar("Answer")


class _Impatient(selectors.DefaultSelector):
    """Where it would wait for ``timeout`` seconds, it advances the clock by them instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if found or timeout == 0:
            return found
        if timeout is None:
            raise RuntimeError(f"at {self.now:.3f} s of the virtual clock every task waits for another one: nothing will ever happen again")
        self.now += timeout
        return []


class VirtualClockLoop(asyncio.SelectorEventLoop):
    """Only for work that waits for timers and for each other: no threads, no network."""

    def __init__(self) -> None:
        self._impatient = _Impatient()
        super().__init__(self._impatient)

    def time(self) -> float:
        return self._impatient.now


def run_virtually(work: Coroutine[Any, Any, Answer]) -> Answer:
    """As `asyncio.run`, with a clock that starts at 0. Raises `RuntimeError` instead of hanging."""
    with asyncio.Runner(loop_factory=VirtualClockLoop) as runner:
        return runner.run(work)
