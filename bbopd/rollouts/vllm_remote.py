"""The run's end of an engine on another machine (`bbopd sample-server`): what `EngineProcess` is to one beside the run.

All of a run is one call, a stream each way. While it lives the server has an engine for this run; where it ends, on either side, the
engine ends too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc
from torch import Tensor

from bbopd.errors import EngineError
from bbopd.rollouts.vllm_messages import MessageError, pack_json, pack_pieces, unpack_json
from bbopd.rpc.channel import open_channel
from bbopd.rpc.security import ClientAccess

METHOD = "/bbopd.v1.SampleService/Session"
_TRANSIENT = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED)
_CONNECT = 20.0  # seconds; a server that has just lost another run needs a moment to end that one's engine
_UNDER_WAY = 8  # pieces of weights that may wait to be sent


@dataclass(frozen=True, slots=True)
class EngineServer:
    """Where an engine is: ``grpc://host:port``, and what it wants to see."""

    target: str
    access: ClientAccess


class EngineConnection:
    """A call to a sample server that has taken this run; made by `open`. ``device`` is the type of the server's."""

    def __init__(self, server: EngineServer, channel: grpc.aio.Channel, call: Any, device: str) -> None:
        self.device = device
        self.pid = None
        self._target = server.target
        self._channel, self._call = channel, call
        self._outbox: asyncio.Queue[bytes] = asyncio.Queue()
        self._sending = asyncio.create_task(self._send())

    @classmethod
    async def open(cls, server: EngineServer) -> EngineConnection:
        """Raises `EngineError` where it cannot be reached, lets nobody in or writes for another run, `ConfigError` for no address."""
        channel = open_channel(server.target, server.access, setting="rollouts")
        deadline = asyncio.get_running_loop().time() + _CONNECT
        try:
            while True:
                call = channel.stream_stream(METHOD)()
                try:
                    hello = unpack_json(await asyncio.wait_for(_next(call), _CONNECT))
                    return cls(server, channel, call, str(hello["device"]))
                except (grpc.aio.AioRpcError, EOFError, TimeoutError) as error:
                    call.cancel()
                    again = isinstance(error, grpc.aio.AioRpcError) and error.code() in _TRANSIENT
                    if not again or asyncio.get_running_loop().time() >= deadline:
                        raise EngineError(_explain_refusal(server.target, error)) from error
                await asyncio.sleep(0.5)
        except BaseException:
            await channel.close()
            raise

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; a call that has ended takes it in silence, and `receive` says so."""
        self._outbox.put_nowait(pack_json(message))

    async def carry(self, memory: Tensor) -> None:
        """Put ``memory`` [bytes], of a window on a CPU, into the server's window, before any message sent after this."""
        for piece in pack_pieces(memory):
            while self._outbox.qsize() >= _UNDER_WAY and not self._sending.done():
                await asyncio.wait({self._sending, asyncio.ensure_future(asyncio.sleep(0.002))}, return_when=asyncio.FIRST_COMPLETED)
            if self._sending.done():
                raise EngineError(self.explain("the call to vLLM ended while weights were on their way"))
            self._outbox.put_nowait(piece)

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises `EngineError` where the call has ended."""
        try:
            return unpack_json(await _next(self._call))
        except (grpc.aio.AioRpcError, EOFError) as error:
            raise EngineError(self.explain(f"the call to vLLM has ended ({_reason(error)})")) from error
        except MessageError as error:
            raise EngineError(self.explain(f"vLLM's server sent what is no answer ({error})")) from error

    def explain(self, what: str) -> str:
        return f"{what}; rollouts.target is {self._target}"

    def kill(self) -> None:
        """End the call, and with it the engine, without waiting. Harmless where it has ended."""
        self._call.cancel()

    async def stop(self) -> None:
        self.kill()
        self._sending.cancel()
        await asyncio.gather(self._sending, return_exceptions=True)
        await self._channel.close()

    async def _send(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # `receive` says why
            while True:
                await self._call.write(await self._outbox.get())


async def _next(call: Any) -> bytes:
    message = await call.read()
    if message is grpc.aio.EOF:
        status = await call.code()
        raise EOFError(f"{status.name}: {await call.details() or 'it closed its end'}")
    return bytes(message)


def _reason(error: Exception) -> str:
    return f"{error.code().name}: {error.details()}" if isinstance(error, grpc.aio.AioRpcError) else str(error)


def _explain_refusal(target: str, error: Exception) -> str:
    code = error.code() if isinstance(error, grpc.aio.AioRpcError) else None
    what = f"no engine at rollouts.target {target} ({_reason(error) or f'no answer within {_CONNECT:g} s'}): "
    if code is grpc.StatusCode.UNAUTHENTICATED:
        return what + "check rollouts.token_file or token_env"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return what + "wait for the other run to end, or start another server"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return what + "what answers there is not `bbopd sample-server`; check the port"
    return what + "is `bbopd sample-server` running there, on this port, and with TLS just where rollouts.tls is set?"
