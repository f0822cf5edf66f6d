"""A teacher behind gRPC: who may come in, limits before the model, batches across clients, chunks and credits on the way back.

``start_server`` is all of it; what runs inside is one `Scheduler` and, per open call, one `ScoreStream` or `Generation`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from typing import NoReturn, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import ConfigError
from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.calls import ProtocolError, Served
from bbopd.rpc.channel import channel_options
from bbopd.rpc.clients import Client, ClientLimits, Clients
from bbopd.rpc.codec import encode_info
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.observe import Observer, client_hash
from bbopd.rpc.replay import ReplayStore
from bbopd.rpc.scheduler import Scheduler
from bbopd.rpc.score_call import ScoreStream
from bbopd.rpc.security import LiveAccess, ServerAccess, TokenCheck
from bbopd.rpc.write_call import Generation

__all__ = ["SERVICE", "RunningServer", "start_server"]

SERVICE = "bbopd.v1.TeacherService"

_CALLS = 1024  # open calls, of all clients
_SERVER_OPTIONS = [
    *channel_options(),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 128),  # of one connection
]
_log = logging.getLogger("bbopd.serve")

AnyCall = TypeVar("AnyCall", ScoreStream, Generation)


class RunningServer:
    """A server that answers on ``port`` until `stop` is called; ``observer`` holds its metrics."""

    def __init__(
        self, server: grpc.aio.Server, service: _TeacherService, checks: health.HealthServicer, host: str, port: int, observer: Observer
    ) -> None:
        self.host = host
        self.port = port
        self.observer = observer
        self._server = server
        self._service = service
        self._checks = checks

    @property
    def target(self) -> str:
        return f"grpc://[{self.host}]:{self.port}" if ":" in self.host else f"grpc://{self.host}:{self.port}"

    def renew_access(self, access: ServerAccess) -> None:
        """Let other certificates and tokens hold from now on; calls made with a token that is no more among them are ended.

        Raises `ConfigError` for what only a restart can change (see `LiveAccess.renew`).
        """
        self._service.access.renew(access)
        self._service.end_unknown()

    async def stop(self, grace: float = 10.0) -> None:
        """Take nothing new, finish what was taken for at most ``grace`` seconds, then close every connection."""
        await self._checks.enter_graceful_shutdown()
        try:
            await asyncio.wait_for(self._service.drain(), grace)
        except TimeoutError:
            _log.warning("stopping with requests unanswered after %g s", grace)
        await self._server.stop(0)
        await self._service.served.scheduler.close()


async def start_server(
    backend: TeacherBackend,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    access: ServerAccess | None = None,
    limits: ClientLimits | None = None,
    batch_tokens: int = 2048,
    max_inflight_bytes: int = 256 * 2**20,
    replay_bytes: int = 256 * 2**20,
) -> RunningServer:
    """Serve ``backend`` on the running event loop.

    Parameters
    ----------
    host : an address of this machine; other than loopback only with TLS and a token.
    port : 0 takes a free one, see ``RunningServer.port``.
    access : certificates and tokens; None is plain text, for everyone on this machine.
    limits : what one client may have in flight.
    batch_tokens : packed tokens of one call of the backend, prompts included.
    max_inflight_bytes : answers made but not yet taken by one client.
    replay_bytes : answers kept for clients that ask again under the same replay_id.

    Raises
    ------
    ConfigError : a host that needs more than ``access`` holds, or a port that cannot be had.
    """
    access, limits, observer = access or ServerAccess(), limits or ClientLimits(), Observer()
    access.require_safe(host)
    live = LiveAccess(access)

    def on_refused(context: grpc.aio.ServicerContext) -> None:
        observer.call_refused("any", client_hash(live.client_name(context)), "unauthenticated")

    server = grpc.aio.server(interceptors=[TokenCheck(live, on_refused)], options=_SERVER_OPTIONS)
    scheduler = Scheduler(backend, batch_tokens=batch_tokens, max_inflight_bytes=max_inflight_bytes, observer=observer)
    info = dataclasses.replace(
        backend.info, max_request_tokens=limits.announced_tokens, max_requests_per_second=limits.requests_per_second or 0.0
    )
    clients = Clients(limits)
    observer.clients.set_function(lambda: len(clients))
    observer.queued_items.set_function(lambda: scheduler.queued_items)
    observer.queued_tokens.set_function(lambda: scheduler.queued_tokens)
    observer.inflight_bytes.set_function(lambda: clients.pending_bytes)
    service = _TeacherService(Served(info, scheduler, clients, ReplayStore(replay_bytes), observer, backend), live)
    checks = health.HealthServicer()
    server.add_generic_rpc_handlers((service.handlers(),))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    address, credentials = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", live.credentials()
    try:
        bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as error:
        await scheduler.close()
        raise ConfigError(
            f"cannot serve on {host}:{port}: the port is taken or not allowed; choose another, or 0 for a free one"
        ) from error
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(server, service, checks, host, bound, observer)


class _TeacherService:
    def __init__(self, served: Served, access: LiveAccess) -> None:
        self.served = served
        self.access = access
        self._calls: dict[ScoreStream | Generation, grpc.aio.ServicerContext] = {}

    def handlers(self) -> grpc.GenericRpcHandler:
        """What the generated code would register, but that answers to `Score` come as bytes already."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "GetInfo": grpc.unary_unary_rpc_method_handler(
                    self.get_info, pb.GetInfoRequest.FromString, pb.GetInfoResponse.SerializeToString
                ),
                "Score": grpc.stream_stream_rpc_method_handler(self.score, pb.ScoreRequest.FromString),
                "Generate": grpc.unary_stream_rpc_method_handler(
                    self.generate, pb.GenerateRequest.FromString, pb.GenerateResponse.SerializeToString
                ),
            },
        )

    async def get_info(self, request: pb.GetInfoRequest, context: grpc.aio.ServicerContext) -> pb.GetInfoResponse:
        return encode_info(self.served.info)

    async def score(self, requests: AsyncIterator[pb.ScoreRequest], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async with (
            self._open(context, "score", lambda client, owner: ScoreStream(self.served, client, owner, requests)) as call,
            aclosing(call.responses()) as responses,
        ):
            async for response in responses:
                yield response

    async def generate(self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext) -> AsyncIterator[pb.GenerateResponse]:
        async with (
            self._open(context, "generate", lambda client, owner: Generation(self.served, client, owner)) as call,
            aclosing(call.responses(request)) as responses,
        ):
            async for response in responses:
                yield response

    def end_unknown(self) -> None:
        """End the calls whose token is known no longer."""
        for call, context in self._calls.items():
            if self.access.now.token_of(context.invocation_metadata() or ()) is None:
                call.end(ProtocolError(grpc.StatusCode.UNAUTHENTICATED, "the token of this call is not valid any more"))

    async def drain(self) -> None:
        """Refuse what is new and wait until all that was taken is answered."""
        self.served.is_draining = True
        for call in tuple(self._calls):
            call.end_if_done()
        while self._calls:
            await asyncio.sleep(0.02)

    @asynccontextmanager
    async def _open(self, context: grpc.aio.ServicerContext, kind: str, make: Callable[[Client, str], AnyCall]) -> AsyncIterator[AnyCall]:
        """A call that was let in, closed whatever ends it; what breaks the protocol ends it with a status."""
        served, name = self.served, self.access.client_name(context)
        try:
            if served.is_draining:
                raise RefusedError("unavailable", "the teacher is shutting down", is_retryable=True, retry_after=1.0)
            if len(self._calls) >= _CALLS:
                raise RefusedError("over_limit", f"the teacher already has {_CALLS} calls open", is_retryable=True, retry_after=5.0)
            client = served.clients.enter(name, kind)
        except RefusedError as error:
            status = grpc.StatusCode.UNAVAILABLE if error.code == "unavailable" else grpc.StatusCode.RESOURCE_EXHAUSTED
            served.observer.call_refused(kind, client_hash(name), error.code)
            await _abort(context, status, str(error), error.retry_after)
        call = make(client, self.access.owner_name(context))
        self._calls[call] = context
        try:
            yield call
        except ProtocolError as error:
            if not served.is_draining:
                served.observer.call_refused(kind, client_hash(name), "protocol")
            await _abort(context, error.code, str(error), error.retry_after)
        finally:
            del self._calls[call]
            await call.close()
            served.clients.leave(client, kind)


async def _abort(context: grpc.aio.ServicerContext, code: grpc.StatusCode, message: str, retry_after: float) -> NoReturn:
    """End a call with a status; gRPC's own name for "not before" goes along where a retry may help."""
    pushback = (("grpc-retry-pushback-ms", str(int(retry_after * 1000))),) if retry_after else ()
    await context.abort(code, message, pushback)
    raise AssertionError("abort raises")
