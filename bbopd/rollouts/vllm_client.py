"""What is asked of the engine's process and what comes back: answers to their askers, and the first failure to everyone who waits."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from bbopd.errors import EngineError, ModelError
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_remote import EngineConnection

_TICK = 1.0  # seconds

Written = asyncio.Queue[dict[str, Any] | Exception | None]
"""Where answers to one stream of prompts arrive; an exception ends it."""


class EngineClient:
    """Over a running `EngineProcess`, or the connection to another machine's; belongs to the event loop that made it.

    ``timeout`` is in seconds without a sign of life.
    """

    def __init__(self, process: EngineProcess | EngineConnection, *, timeout: float) -> None:
        self.process = process
        self._timeout = timeout
        self._failure: EngineError | None = None
        self._reply: asyncio.Future[None] | None = None
        self._writing: dict[int, Written] = {}  # by request
        self._next_request = 0
        self._heard = 0
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]

    async def ask(self, **message: Any) -> None:
        """Send a message that is answered with "done", and wait for that; one at a time.

        Raises
        ------
        ModelError
            It was refused.
        EngineError
            The engine has failed, before or meanwhile.
        """
        self.check()
        assert self._reply is None, "one question at a time"
        self._reply = asyncio.get_running_loop().create_future()
        try:
            self.process.send(message)
            await self._reply
        finally:
            self._reply = None

    def write(self, written: Written, **message: Any) -> int:
        """Ask for one answer, which will arrive in ``written``; the request's number. Raises `EngineError`."""
        self.check()
        request, self._next_request = self._next_request, self._next_request + 1
        self._writing[request] = written
        self.process.send({"op": "write", "request": request, **message})
        return request

    def abort(self, requests: Iterable[int]) -> None:
        """Have these written no further; nothing of them arrives any more."""
        aborted = list(requests)
        for request in aborted:
            self._writing.pop(request, None)
        if aborted and self._failure is None:
            self.process.send({"op": "abort", "requests": aborted})

    def check(self) -> None:
        """Raises the failure, where there has been one."""
        if self._failure is not None:
            raise self._failure

    def fail(self, error: EngineError) -> None:
        """Kill the process and let all who wait know why; only the first failure counts."""
        if self._failure is not None:
            return
        self._failure = error
        self.process.kill()
        if self._reply is not None and not self._reply.done():
            self._reply.set_exception(error)
        for written in {id(written): written for written in self._writing.values()}.values():
            written.put_nowait(error)
        self._writing.clear()

    async def close(self) -> None:
        """End the process. Harmless where it has ended."""
        self.fail(EngineError("vLLM's engine has been closed"))
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.process.stop()

    async def _read(self) -> None:
        try:
            while True:
                message = await self.process.receive()
                self._heard += 1
                event = message["event"]
                if event == "written":
                    written = self._writing.pop(message["request"], None)
                    if written is not None:
                        written.put_nowait(message)
                elif event == "failed":
                    self.fail(EngineError(self.process.explain(f"vLLM has failed ({message['error']})")))
                elif event in ("done", "refused") and self._reply is not None and not self._reply.done():
                    if event == "done":
                        self._reply.set_result(None)
                    else:
                        self._reply.set_exception(ModelError(message["error"]))
        except EngineError as error:
            self.fail(error)

    async def _watch(self) -> None:
        """Ticks without a word are counted, not seconds: while the trainer keeps the event loop, nothing can be heard."""
        silent = 0.0
        while self._failure is None:
            heard = self._heard
            await asyncio.sleep(_TICK)
            is_waited_for = self._reply is not None or bool(self._writing)
            silent = silent + _TICK if is_waited_for and self._heard == heard else 0.0
            if silent >= self._timeout:
                self.fail(EngineError(self.process.explain(f"vLLM has not been heard of for {silent:g} s (rollouts.timeout)")))
