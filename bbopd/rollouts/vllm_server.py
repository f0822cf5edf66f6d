"""``bbopd sample-server``: an engine for runs on other machines, for one run at a time.

Of a run's messages those that belong to the engine's process go there as they came; pieces of weights go into a window of memory that the
process sees, as they do from a run on the same machine. So what the process does, and what it says, is the same in both places.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

from bbopd.errors import ConfigError, EngineError
from bbopd.rollouts.vllm_messages import MessageError, pack_json, unpack_json, unpack_piece
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_weights import WeightWindow
from bbopd.rpc.channel import channel_options
from bbopd.rpc.security import LiveAccess, ServerAccess, TokenCheck, peer_host
from bbopd.vllm_setup import engine_environment

StartProcess = Callable[[Mapping[str, str], Path, Sequence[int]], Awaitable[EngineProcess]]
SERVICE = "bbopd.v1.SampleService"
_OPERATIONS = {"write", "abort", "drain", "load", "finish"}
_log = logging.getLogger("bbopd.sample-server")


async def start_vllm(environment: Mapping[str, str], log: Path, shared_files: Sequence[int]) -> EngineProcess:
    return await EngineProcess.start(environment, log, shared_files=shared_files)


class SampleServer:
    """Answers on ``port`` of ``host`` until `stop`; made by `start`."""

    def __init__(self, server: grpc.aio.Server, sessions: _Sessions, access: LiveAccess, host: str, port: int) -> None:
        self.target = f"grpc://[{host}]:{port}" if ":" in host else f"grpc://{host}:{port}"
        self._server, self._sessions, self._access = server, sessions, access

    @classmethod
    async def start(
        cls,
        *,
        host: str,
        port: int,
        device: torch.device,
        access: ServerAccess,
        trust_remote_code: bool = False,
        start_process: StartProcess = start_vllm,
    ) -> SampleServer:
        """Raises `ConfigError` for a host that needs more than ``access`` holds, or a port that cannot be had."""
        access.require_safe(host)
        live = LiveAccess(access)

        def on_refused(context: grpc.aio.ServicerContext) -> None:
            _log.warning("a call from %s brought no valid token", peer_host(context.peer()))

        server = grpc.aio.server(interceptors=[TokenCheck(live, on_refused)], options=[*channel_options(), ("grpc.so_reuseport", 0)])
        sessions = _Sessions(device, trust_remote_code, start_process)
        handler = grpc.stream_stream_rpc_method_handler(sessions.serve)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Session": handler}),))
        checks = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        address, credentials = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", live.credentials()
        try:
            bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
        except RuntimeError as error:
            raise ConfigError(
                f"cannot serve on {host}:{port}: the port is taken or not allowed; choose another, or 0 for a free one"
            ) from error
        await server.start()
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        return cls(server, sessions, live, host, bound)

    def renew_access(self, access: ServerAccess) -> None:
        """Let other certificates and tokens hold from now on; a run whose token is no more among them is ended.

        Raises `ConfigError` for what only a restart can change (see `LiveAccess.renew`).
        """
        self._access.renew(access)
        self._sessions.end_unknown(access)

    async def stop(self) -> None:
        """End the run that is written for, and every connection."""
        await self._server.stop(0)
        while self._sessions.is_taken:  # the engine's process is being ended
            await asyncio.sleep(0.02)


class _UnknownTokenError(Exception):
    """The token that let a run in is known no longer."""


class _Sessions:
    """One at a time; each has a process of its own, which ends with it."""

    def __init__(self, device: torch.device, trust_remote_code: bool, start_process: StartProcess) -> None:
        self._device, self._trust, self._start_process = device, trust_remote_code, start_process
        self._now: tuple[grpc.aio.ServicerContext, asyncio.Future[None]] | None = None  # a session, and what ends it by an error

    @property
    def is_taken(self) -> bool:
        return self._now is not None

    def end_unknown(self, access: ServerAccess) -> None:
        """End the session where ``access`` does not know its token."""
        if self._now is None:
            return
        context, ended = self._now
        if access.token_of(context.invocation_metadata() or ()) is None and not ended.done():
            ended.set_exception(_UnknownTokenError("the token of this call is not valid any more"))

    async def serve(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        if self.is_taken:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "it writes for another run")
        ended = asyncio.get_running_loop().create_future()
        self._now = context, ended
        peer = peer_host(context.peer())
        _log.info("writing for a run at %s", peer)
        try:
            async with AsyncExitStack() as stack:
                await context.write(pack_json({"event": "hello", "device": self._device.type}))
                window, process = await self._open(unpack_json(await anext(requests)), stack)
                await _relay(requests, context, window, process, ended)
        except StopAsyncIteration:
            pass  # gone before it asked for anything
        except (MessageError, ConfigError) as error:
            _log.warning("the run at %s was turned away: %s", peer, error)
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except EngineError as error:
            _log.warning("the engine for the run at %s has failed: %s", peer, error)
            await context.abort(grpc.StatusCode.INTERNAL, str(error)[:4000])
        except _UnknownTokenError as error:
            _log.warning("the run at %s was ended: %s", peer, error)
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
        finally:
            self._now = None
            ended.cancel()
            _log.info("the run at %s has gone", peer)

    async def _open(self, asked: dict[str, Any], stack: AsyncExitStack) -> tuple[WeightWindow, EngineProcess]:
        """The process that a run's first message asks for, and the window that both see."""
        try:
            dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[asked["dtype"]]
            configuration, largest = str(asked.pop("configuration")), int(asked.pop("largest_parameter"))
        except (KeyError, TypeError, ValueError) as error:
            raise MessageError(f"a run's first message must say what is to be started: {error!r}") from error
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bbopd-sample-server-")))
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(configuration, encoding="utf-8")
        window = WeightWindow([largest], dtype, self._device)
        stack.callback(window.close)
        shared = () if window.file is None else (window.file,)
        environment = engine_environment(self._device.type)
        process = await self._start_process(environment.variables, folder / "vllm.log", shared)
        stack.push_async_callback(process.stop)
        trusts = self._trust and bool(asked.get("trust_remote_code"))
        here = {"model": str(folder / "model"), "device": self._device.type, "trust_remote_code": trusts, "window": window.describe()}
        process.send({**asked, "op": "start", **here})
        return window, process


async def _relay(
    requests: AsyncIterator[bytes],
    context: grpc.aio.ServicerContext,
    window: WeightWindow,
    process: EngineProcess,
    ended: asyncio.Future[None],
) -> None:
    """Until either side ends, or is ``ended``. Raises what has gone wrong: `MessageError` by the run, `EngineError` by the engine."""

    async def to_the_process() -> None:
        async for message in requests:
            if message[:1] == b"W":
                start, piece = unpack_piece(message, window.capacity)
                window.memory[start : start + len(piece)].copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
                continue
            asked = unpack_json(message)
            if asked.get("op") not in _OPERATIONS:
                raise MessageError(f"operation {asked.get('op')!r} is none of {', '.join(sorted(_OPERATIONS))}")
            if asked["op"] == "load" and window.device.type == "cuda":
                torch.cuda.synchronize(window.device)  # the process reads as soon as it hears of this
            process.send(asked)

    async def to_the_run() -> None:
        while True:
            message = await process.receive()
            if message["event"] == "failed":
                raise EngineError(process.explain(f"vLLM has failed ({message['error']})"))
            await context.write(pack_json(message))

    tasks = {asyncio.create_task(to_the_process()), asyncio.create_task(to_the_run())}
    try:
        done, _ = await asyncio.wait({*tasks, ended}, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
