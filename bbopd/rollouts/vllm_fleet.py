"""Rollouts by several engines on other machines, of which more may come, and any may go, while they write.

Which there are is in a file, an address a line, that is read over and over. Each engine is a `VLLMEngine` at a `bbopd sample-server`. What
was pushed last is kept in this process's memory, so that an engine which comes, or comes back, has the version that the others write with.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from bbopd.errors import BbopdError, EngineError
from bbopd.rollouts.vllm import VLLMEngine
from bbopd.types import Prompt, Rollout, Sampling

_TICK = 0.5  # seconds
_REST = 3.0  # seconds before an engine that failed is tried again

StartEngine = Callable[[str], Awaitable[VLLMEngine]]
"""Starts an engine at an address. Raises `EngineError`."""


@dataclass(slots=True, eq=False)
class _Stream:
    """One `EngineFleet.generate` under way."""

    sampling: Sampling
    given: dict[str, dict[int, Prompt]] = field(default_factory=dict)  # engine -> draw -> prompt, not answered yet
    queues: dict[str, asyncio.Queue[tuple[int, Prompt] | None]] = field(default_factory=dict)
    waiting: list[tuple[int, Prompt]] = field(default_factory=list)  # that no engine has
    answers: asyncio.Queue[Rollout | Exception | None] = field(default_factory=asyncio.Queue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


class EngineFleet:
    """A `RolloutEngine`; made by `open`, ended by `close`."""

    def __init__(self, targets: Path, start: StartEngine, dtype: torch.dtype, timeout: float, note: Callable[[str], None]) -> None:
        self.asked_again = 0
        """Prompts that were asked of an engine which went before it answered, and then of another."""
        self._targets, self._start, self._dtype, self._timeout, self._note = targets, start, dtype, timeout, note
        self._listed: set[str] = set()
        self._members: dict[str, VLLMEngine] = {}
        self._attaching: dict[str, asyncio.Task[None]] = {}
        self._rests_until: dict[str, float] = {}
        self._ending: set[asyncio.Task[None]] = set()
        self._weights: dict[str, Tensor] = {}
        self._version: int | None = None
        self._pushing = asyncio.Lock()
        self._streams: set[_Stream] = set()
        self._changed = asyncio.Condition()
        self._trouble = ""
        self._watching = asyncio.create_task(self._watch())

    @classmethod
    async def open(
        cls, targets: str | Path, start: StartEngine, *, dtype: torch.dtype, timeout: float, note: Callable[[str], None]
    ) -> EngineFleet:
        """Wait for the first engine.

        Parameters
        ----------
        targets : the file of addresses.
        dtype : of the weights as the engines have them.
        timeout : seconds that there may be no engine at all.
        note : hears which engines come and go.

        Raises
        ------
        EngineError : none came within ``timeout``.
        """
        fleet = cls(Path(targets), start, dtype, timeout, note)
        try:
            await asyncio.wait_for(fleet._until(lambda: bool(fleet._members)), timeout)
        except BaseException as error:
            await fleet.close()
            if isinstance(error, TimeoutError):
                raise fleet._nobody() from None
            raise
        return fleet

    @property
    def size(self) -> int:
        """Engines that write now."""
        return len(self._members)

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        """As `VLLMEngine.generate`; the engine with the least to write gets the next prompt.

        Raises
        ------
        DataError, ModelError : as an engine does.
        EngineError : there has been no engine for ``timeout`` seconds.
        """
        stream = _Stream(sampling)
        self._streams.add(stream)
        for target in self._members:
            self._join(stream, target)
        unanswered, is_drawn = 0, False

        async def draw() -> None:
            nonlocal unanswered
            drawn = 0
            try:
                async for prompt in prompts:
                    unanswered += 1
                    stream.waiting.append((drawn, prompt))
                    drawn += 1
                    self._assign(stream)
                    await self._until(lambda: not stream.waiting)
            except Exception as error:
                stream.answers.put_nowait(error)
            else:
                stream.answers.put_nowait(None)

        stream.tasks.add(asyncio.create_task(draw()))
        try:
            while unanswered or not is_drawn:
                answer = await stream.answers.get()
                if answer is None:
                    is_drawn = True
                    continue
                if isinstance(answer, Exception):
                    raise answer
                unanswered -= 1
                yield answer
        finally:
            self._streams.discard(stream)
            for task in stream.tasks:
                task.cancel()
            await asyncio.gather(*stream.tasks, return_exceptions=True)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """As `VLLMEngine.load_weights`, into all of them; one that fails is left to itself, and tried again later. Raises `ModelError`."""
        async with self._pushing:
            names = await asyncio.to_thread(self._keep, weights)
            self._version = version
            members = dict(self._members)
            pushed = [(name, self._weights[name]) for name in names]
            outcomes = await asyncio.gather(*(engine.load_weights(pushed, version) for engine in members.values()), return_exceptions=True)
            for target, outcome in zip(members, outcomes, strict=True):
                if isinstance(outcome, EngineError):
                    await self._lose(target, str(outcome))
                elif isinstance(outcome, BaseException):
                    raise outcome

    async def close(self) -> None:
        """End what was written, on all of them."""
        tasks = {self._watching, *self._attaching.values()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*self._ending, *(engine.close() for engine in self._members.values()), return_exceptions=True)
        self._members.clear()

    # ------------------------------------------------------------ prompts

    def _assign(self, stream: _Stream) -> None:
        """Give what waits to the engines that have room, the least loaded first, in the order of drawing."""
        stream.waiting.sort(key=lambda item: item[0])
        while stream.waiting:
            free = [target for target in stream.queues if len(stream.given[target]) < self._members[target].room]
            if not free:
                return
            target = min(free, key=lambda target: len(stream.given[target]))
            draw, prompt = stream.waiting.pop(0)
            stream.given[target][draw] = prompt
            stream.queues[target].put_nowait((draw, prompt))

    def _join(self, stream: _Stream, target: str) -> None:
        stream.given[target], stream.queues[target] = {}, asyncio.Queue()
        task = asyncio.create_task(self._write(stream, target, self._members[target], stream.queues[target]))
        stream.tasks.add(task)
        self._assign(stream)

    async def _write(self, stream: _Stream, target: str, engine: VLLMEngine, queue: asyncio.Queue[tuple[int, Prompt] | None]) -> None:
        async def asked() -> AsyncIterator[tuple[int, Prompt]]:
            while (item := await queue.get()) is not None:
                yield item

        try:
            async with aclosing(engine.write(asked(), stream.sampling)) as rollouts:
                async for rollout in rollouts:
                    if stream.given.get(target, {}).pop(rollout.draw, None) is not None:
                        stream.answers.put_nowait(rollout)
                        self._assign(stream)
                        await self._tell()
        except EngineError as error:
            await self._lose(target, str(error), engine)
        except Exception as error:
            stream.answers.put_nowait(error)

    # ------------------------------------------------------------ who is there

    async def _watch(self) -> None:
        """Ticks without an engine are counted, not seconds, as `EngineClient` does."""
        alone = 0.0
        while True:
            self._look()
            for target, engine in list(self._members.items()):
                try:
                    engine.check()
                except EngineError as error:
                    await self._lose(target, str(error), engine)
                if target not in self._listed:
                    await self._lose(target, "it is no more in the list", engine)
            alone = 0.0 if self._members else alone + _TICK
            if alone >= self._timeout:
                for stream in self._streams:
                    stream.answers.put_nowait(self._nobody())
            await asyncio.sleep(_TICK)

    def _look(self) -> None:
        """Read the file, and begin to attach what is new in it, or has rested."""
        with suppress(OSError):  # it is about to be there
            self._listed = set(self._targets.read_text(encoding="utf-8").split())
        now = asyncio.get_running_loop().time()
        for target in sorted(self._listed - self._members.keys() - self._attaching.keys()):
            if now >= self._rests_until.get(target, 0.0):
                task = asyncio.create_task(self._attach(target))
                self._attaching[target] = task
                task.add_done_callback(lambda done, target=target: self._attaching.pop(target, None))  # type: ignore[misc]

    async def _attach(self, target: str) -> None:
        engine = None
        try:
            engine = await self._start(target)
            async with self._pushing:
                if self._version is not None:
                    await engine.load_weights(self._weights.items(), self._version)
                self._members[target] = engine
                for stream in self._streams:
                    self._join(stream, target)
        except BbopdError as error:
            self._trouble = str(error)
            self._rests_until[target] = asyncio.get_running_loop().time() + _REST
            if engine is not None:
                await engine.close()
            return
        self._note(f"an engine writes at {target}: {len(self._members)} now")
        await self._tell()

    async def _lose(self, target: str, why: str, engine: VLLMEngine | None = None) -> None:
        """Go on without it; what it had not answered is asked of the others."""
        known = self._members.get(target)
        if known is None or (engine is not None and engine is not known):
            return  # it has been lost before
        del self._members[target]
        self._trouble = why
        self._rests_until[target] = asyncio.get_running_loop().time() + _REST
        asked = 0
        for stream in self._streams:
            stream.queues.pop(target).put_nowait(None)
            given = stream.given.pop(target)
            asked += len(given)
            stream.waiting.extend(given.items())
            self._assign(stream)
        self.asked_again += asked
        self._note(f"the engine at {target} is gone ({why.splitlines()[0]}): {len(self._members)} left, {asked} prompts asked again")
        closing = asyncio.create_task(known.close())
        self._ending.add(closing)
        closing.add_done_callback(self._ending.discard)
        await self._tell()

    def _nobody(self) -> EngineError:
        found = f"; at last: {self._trouble}" if self._trouble else ""
        return EngineError(f"no engine of {self._targets} has answered for {self._timeout:g} s (rollouts.timeout){found}")

    # ------------------------------------------------------------ weights, and waiting

    def _keep(self, weights: Iterable[tuple[str, Tensor]]) -> list[str]:
        """Take what is pushed into this process's memory; returns its names."""
        names = []
        for name, tensor in weights:
            kept = self._weights.get(name)
            if kept is None:
                kept = self._weights[name] = torch.empty(tensor.shape, dtype=self._dtype)
            kept.copy_(tensor.detach())
            names.append(name)
        return names

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _until(self, is_true: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(is_true)
