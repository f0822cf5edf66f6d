"""Prompts on their way from the event loop to the thread that decodes."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

from bbopd.types import Prompt

_PATIENCE = 5.0  # seconds


@dataclass(frozen=True, slots=True)
class Request:
    """One answer to write; ``draw`` is the prompt's place in its stream."""

    prompt: Prompt
    draw: int


class Requests:
    """A queue of at most ``room`` requests: filled on the event loop by `feed`, emptied by a thread.

    The thread waits for as many as it has rows for, so that which requests share a batch depends on the stream alone and not on who was
    faster. A stream that leaves it waiting for ``patience`` seconds is not waited for again while there is something to write.
    """

    def __init__(self, room: int, patience: float = _PATIENCE) -> None:
        self._room, self._patience = room, patience
        self._loop = asyncio.get_running_loop()
        self._changed = threading.Condition()
        self._has_room = asyncio.Event()
        self._waiting: deque[Request] = deque()
        self._is_closed = False
        self._is_slow = False

    # ------------------------------------------------------------ on the event loop

    async def feed(self, prompts: AsyncIterator[Prompt], check: Callable[[Prompt], None]) -> None:
        """Put every prompt in, as there is room. Ends the queue where the stream ends, or where ``check`` or the stream raises."""
        try:
            draw = 0
            async for prompt in prompts:
                check(prompt)
                while len(self._waiting) >= self._room:
                    self._has_room.clear()
                    await self._has_room.wait()
                with self._changed:
                    self._waiting.append(Request(prompt, draw))
                    self._changed.notify_all()
                draw += 1
        finally:
            self.close()

    def close(self) -> None:
        """No more will come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    # ------------------------------------------------------------ on the thread

    @property
    def is_over(self) -> bool:
        """Nothing is waiting and nothing will come."""
        with self._changed:
            return self._is_closed and not self._waiting

    def take_first(self, count: int) -> list[Request]:
        """As `take`, but one at least, however long that lasts; none where nothing will come."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
        return self.take(count)

    def take(self, count: int, fits: Callable[[Request], bool] = lambda request: True) -> list[Request]:
        """The next ``count``, or those before the first that does not fit, or fewer where the stream ends or is slow."""
        with self._changed:
            wanted = min(count, self._room)
            if not self._is_slow:
                is_there = self._changed.wait_for(lambda: len(self._waiting) >= wanted or self._is_closed, timeout=self._patience)
                self._is_slow = not is_there
            taken: list[Request] = []
            while self._waiting and len(taken) < wanted and fits(self._waiting[0]):
                taken.append(self._waiting.popleft())
        self._loop.call_soon_threadsafe(self._has_room.set)
        return taken

    def put_back(self, requests: list[Request]) -> None:
        with self._changed:
            self._waiting.extendleft(reversed(requests))
