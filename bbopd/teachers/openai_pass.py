"""One stream of items through an endpoint: as many at once as tokens allow, and given up when it has been silent for too long."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from bbopd.errors import BudgetSpentError, TeacherError
from bbopd.teachers.openai_client import ApiClient

__all__ = ["Pass"]

_AT_ONCE = 256  # items, however short

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class _Ready(Generic[Answer]):
    answer: Answer
    tokens: int


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class Pass(Generic[Item, Answer]):
    """Asks about every item of a stream.

    Parameters
    ----------
    ask : one item; it makes its own retries.
    tokens_of : what an item adds to what is in flight, until its answer has been taken.
    timeout : seconds without any answer, while some are due, before the endpoint counts as gone.
    inflight_tokens : a single longer item still goes, alone.
    """

    def __init__(
        self,
        client: ApiClient,
        ask: Callable[[Item], Awaitable[Answer]],
        tokens_of: Callable[[Item], int],
        *,
        timeout: float,
        inflight_tokens: int,
    ) -> None:
        self._client = client
        self._ask = ask
        self._tokens_of = tokens_of
        self._timeout = timeout
        self._limit = inflight_tokens
        self._tokens = 0
        self._room = asyncio.Event()
        self._running: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Queue[_Ready[Answer] | _End] = asyncio.Queue()
        self._answered = 0

    async def run(self, items: AsyncIterator[Item]) -> AsyncGenerator[Answer, None]:
        """Answers as each is ready. Raises `TeacherError` saying what was answered; errors of the source pass through."""
        feeder = asyncio.create_task(self._feed(items))
        try:
            while True:
                ready = await self._next()
                if isinstance(ready, _Ready):
                    yield self._taken(ready)
                    continue
                if isinstance(ready.error, BudgetSpentError):
                    await self._wait_for_what_is_paid(feeder)
                    while not self._ready.empty():
                        if isinstance(last := self._ready.get_nowait(), _Ready):
                            yield self._taken(last)
                if ready.error is not None:
                    raise ready.error
                return
        finally:
            for task in (feeder, *self._running):
                task.cancel()
            await asyncio.gather(feeder, *self._running, return_exceptions=True)

    def _taken(self, ready: _Ready[Answer]) -> Answer:
        self._tokens -= ready.tokens
        self._room.set()
        self._answered += 1
        return ready.answer

    async def _wait_for_what_is_paid(self, feeder: asyncio.Task[None]) -> None:
        """Let requests that have been sent come to their end, within the time limit, and give up all others."""
        sending = self._running & self._client.sending
        for task in (feeder, *(self._running - sending)):
            task.cancel()
        if sending:
            await asyncio.wait(sending, timeout=self._timeout)

    async def _next(self) -> _Ready[Answer] | _End:
        """What is ready next. A silence is counted only while an answer is due, and while the caller waits for it."""
        tick = min(1.0, self._timeout / 8)
        silence, answers = 0.0, self._client.answers
        while True:
            try:
                async with asyncio.timeout(tick):
                    return await self._ready.get()
            except TimeoutError:
                is_silent = self._client.on_wire > 0 and self._client.answers == answers
                silence, answers = (silence + tick if is_silent else 0.0), self._client.answers
            if silence >= self._timeout:
                health = self._client.health
                trouble = f" (last trouble: {health.trouble})" if health.faults else ""
                raise TeacherError(
                    f"teacher at {self._client.address.target} has not answered for {self._timeout:g} s (teacher.timeout){trouble}; "
                    f"{self._answered} items were answered, {len(self._running)} are not"
                )

    async def _feed(self, items: AsyncIterator[Item]) -> None:
        """Take items from the source as long as there is room, each into a task of its own."""
        error: BaseException | None = None
        try:
            async for item in items:
                tokens = self._tokens_of(item)
                while len(self._running) >= _AT_ONCE or (self._tokens and self._tokens + tokens > self._limit):
                    self._room.clear()
                    await self._room.wait()
                self._tokens += tokens
                task = asyncio.create_task(self._answer(item, tokens))
                self._running.add(task)
                task.add_done_callback(self._forget)
            while self._running:
                await asyncio.wait(set(self._running))
        except Exception as caught:
            error = caught
        self._ready.put_nowait(_End(error))

    def _forget(self, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._room.set()

    async def _answer(self, item: Item, tokens: int) -> None:
        try:
            self._ready.put_nowait(_Ready(await self._ask(item), tokens))
        except Exception as error:
            self._ready.put_nowait(_End(error))
