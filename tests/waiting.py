"""Waiting for what is going to happen, however slow the machine is just now, and for nothing longer than it takes.

`until` and `wait_until` wait for a condition, `HeldBackend` is a teacher that is slow for as long as a test wants, and on a
`hasty` loop seconds pass in milliseconds, so that a test of a time limit can let it be long: no stall of the machine reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import socket
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
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
    """A `FakeBackend` whose calls, but for the first ``free`` ones, wait inside the model, once counted in ``calls``, until `go_on`."""

    def __init__(self, vocab_size: int = 64, *, free: int = 0, **options: Any) -> None:
        super().__init__(vocab_size, **options)
        self._free = free
        self._may_go = threading.Event()

    def go_on(self) -> None:
        """Let the calls that wait, and all later ones, be answered."""
        self._may_go.set()

    def _begin(self, count: int) -> None:
        super()._begin(count)
        assert len(self.calls) <= self._free or self._may_go.wait(PATIENCE), f"held for {PATIENCE:g} s: call go_on"


def measure(server: RunningServer, name: str, **labels: str) -> float:
    """What the server's metrics say of ``bbopd_<name>``; 0 for what has not happened yet."""
    return server.observer.registry.get_sample_value(f"bbopd_{name}", labels) or 0.0


def open_calls(server: RunningServer, kind: str) -> int:
    """How many calls of a ``kind``, "score" or "generate", a server has open; those that ended have given back what they had."""
    return int(measure(server, "open_calls", kind=kind))


def arrived(server: RunningServer, backend: FakeBackend) -> int:
    """How many items the server has taken that went to the model or wait for it."""
    return sum(backend.calls) + int(measure(server, "queued_items"))


def unused_port() -> int:
    """A port that nobody else will take: below those that systems give out by themselves."""
    while True:
        port = random.SystemRandom().randrange(10_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


# ---------------------------------------------------------------- time limits


class HastyLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock can be ahead of the real one."""

    ahead = 0.0

    def time(self) -> float:
        return super().time() + self.ahead


def hasty(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an async test on a `HastyLoop`, where `hurried` can be used."""

    @functools.wraps(test)
    def run(*arguments: Any, **options: Any) -> None:
        async def whole() -> None:
            await test(*arguments, **options)

        with asyncio.Runner(loop_factory=HastyLoop) as runner:
            runner.run(whole())

    return run


@contextlib.asynccontextmanager
async def hurried(seconds: float = 0.25) -> AsyncIterator[None]:
    """Let the loop's clock gain so many ``seconds`` every 5 ms: what waits on it for a minute waits for about one second."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, HastyLoop), "mark the test with @hasty"

    async def hurry() -> None:
        while True:
            await asyncio.sleep(0.005)  # for what the network brings
            loop.ahead += seconds

    hurrying = asyncio.create_task(hurry())
    try:
        yield
    finally:
        hurrying.cancel()


async def time_passes() -> None:
    """Hurry, until cancelled."""
    async with hurried():
        await asyncio.Event().wait()
