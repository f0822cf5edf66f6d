"""How tasks that share some state wait for each other to change it, and which of several failures counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Changes:
    """Whoever changes the shared state tells; whoever waits for something in it looks again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def tell(self) -> None:
        self._event.set()

    async def wait(self) -> None:
        self._event.clear()
        await self._event.wait()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            await self.wait()


def first_failure(failures: BaseExceptionGroup[BaseException]) -> BaseException:
    """The failure that came first; later ones are mostly its consequences."""
    failure: BaseException = failures
    while isinstance(failure, BaseExceptionGroup):
        failure = failure.exceptions[0]
    return failure
