"""A teacher in this process: the `Teacher` protocol over any backend, with the limits and checks of the wire but no wire."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from bbopd.errors import BadAnswerError, BbopdError, TeacherError
from bbopd.rpc.backend import TeacherBackend, with_ids
from bbopd.rpc.limits import check_prompt, check_rollout, check_sampling, check_want
from bbopd.rpc.signals import check_signal
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec

__all__ = ["LocalTeacher"]

_QUEUED_ITEMS = 64
_LINGER = 0.005  # seconds that an idle model waits for more of a burst

Item = TypeVar("Item", Rollout, Prompt)


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None


class LocalTeacher:
    """Batches by token count and runs the backend in a thread of its own; answers come in the order of the rollouts.

    Parameters
    ----------
    batch_tokens : packed tokens of one call of the backend, prompts included.
    run : calls the backend and gives what it returns, in place of a thread of its own: for a model that others use too.
    """

    def __init__(
        self, backend: TeacherBackend, *, batch_tokens: int = 2048, run: Callable[..., Awaitable[list[Any]]] | None = None
    ) -> None:
        self.info = backend.info
        self._backend = backend
        self._batch_tokens = batch_tokens
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bbopd-teacher")  # starts with its first call
        self._call = run or self._in_thread

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Raises `TeacherError` for what is not offered, `BadAnswerError` where the model gives no proper signal."""
        check_want(want, self.info)

        def count_tokens(rollout: Rollout) -> int:
            check_rollout(rollout, want, self.info)
            return len(rollout.all_ids)

        async with aclosing(self._batches(rollouts, count_tokens)) as batches:
            async for batch in batches:
                for rollout, signal in zip(batch, await self._run(self._backend.score, batch, want), strict=True):
                    try:
                        check_signal(signal, want, np.array(rollout.token_ids, np.int32), self.info.vocab_size)
                    except ValueError as error:
                        raise BadAnswerError(f"rollout {rollout.rollout_id}: teacher {self.info.model}'s answer {error}") from None
                    yield ScoredRollout(rollout, signal)

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """Raises `TeacherError` where the teacher does not write, or cannot write like this."""
        check_sampling(sampling, self.info)

        def count_tokens(prompt: Prompt) -> int:
            check_prompt(prompt, sampling, self.info)
            return len(prompt.token_ids) + sampling.max_new_tokens

        asked: dict[Prompt, Prompt] = {}

        async def encoded() -> AsyncIterator[Prompt]:
            async for prompt in prompts:
                check_prompt(prompt, sampling, self.info)
                read = with_ids(prompt, self._backend)
                asked[read] = prompt
                yield read

        async with aclosing(self._batches(encoded(), count_tokens)) as batches:
            async for batch in batches:
                for completion in await self._run(self._backend.generate, batch, sampling):
                    yield replace(completion, prompt=asked[completion.prompt])

    async def close(self) -> None:
        """Let the thread go, after the call it is in."""
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self, call: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        try:
            return await self._call(call, *arguments)
        except BbopdError:
            raise
        except Exception as error:
            raise TeacherError(f"teacher {self.info.model} failed: {type(error).__name__}: {error}") from error

    async def _in_thread(self, call: Callable[..., list[Any]], *arguments: Any) -> list[Any]:
        return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)

    async def _batches(self, items: AsyncIterator[Item], count_tokens: Callable[[Item], int]) -> AsyncGenerator[list[Item], None]:
        """What has come so far, up to a batch: a source that waits for answers before it goes on is not waited for in turn."""
        queue: asyncio.Queue[tuple[Item, int] | _Ended] = asyncio.Queue(_QUEUED_ITEMS)
        pump = asyncio.create_task(_pump(items, count_tokens, queue))
        waiting: deque[tuple[Item, int] | _Ended] = deque()
        try:
            while True:
                if not waiting:
                    waiting.append(await queue.get())
                    await asyncio.sleep(_LINGER)
                while not queue.empty():
                    waiting.append(queue.get_nowait())
                batch: list[Item] = []
                room = self._batch_tokens
                while waiting and not isinstance(waiting[0], _Ended) and (not batch or waiting[0][1] <= room):
                    batch.append(waiting[0][0])
                    room -= waiting[0][1]
                    waiting.popleft()
                if batch:
                    yield batch
                elif isinstance(waiting[0], _Ended):
                    if waiting[0].error is not None:
                        raise waiting[0].error
                    return
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)


async def _pump(items: AsyncIterator[Item], count_tokens: Callable[[Item], int], queue: asyncio.Queue[tuple[Item, int] | _Ended]) -> None:
    """Take items as they come; what the source raises, or a check of it, comes after those before it."""
    ended = _Ended(None)
    try:
        async for item in items:
            await queue.put((item, count_tokens(item)))
    except Exception as error:
        ended = _Ended(error)
    await queue.put(ended)
