"""A teacher behind gRPC: limits before the model, batches across clients, chunks and credits on the way back.

``start_server`` is all of it; what runs inside is one `Scheduler` and, per open `Score` call, one `_ScoreStream`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import ConfigError
from bbopd.rpc.answers import answer_bytes, signal_chunks
from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.channel import channel_options
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_item, decode_prompt, decode_sampling, encode_completion, encode_failure, encode_info
from bbopd.rpc.limits import RefusedError, check_prompt, check_rollout, check_sampling, check_want
from bbopd.rpc.scheduler import Answer, Job, Scheduler
from bbopd.rpc.security import ServerAccess, TokenCheck
from bbopd.types import Completion, Rollout, SignalSpec, TeacherSignal

__all__ = ["SERVICE", "RunningServer", "start_server"]

SERVICE = "bbopd.v1.TeacherService"

_REQUEST_WINDOW = 8 * 2**20  # bytes of token ids one client may have sent and the model not yet taken
_CALLS = 64  # open calls, of all clients
_SERVER_OPTIONS = [
    *channel_options(),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 20_000),
    ("grpc.max_concurrent_streams", 100),  # of one connection
]
_log = logging.getLogger("bbopd.serve")


class RunningServer:
    """A server that answers on ``port`` until `stop` is called."""

    def __init__(self, server: grpc.aio.Server, service: _TeacherService, checks: health.HealthServicer, host: str, port: int) -> None:
        self.host = host
        self.port = port
        self._server = server
        self._service = service
        self._checks = checks

    async def stop(self, grace: float = 10.0) -> None:
        """Take nothing new, finish what was taken for at most ``grace`` seconds, then close every connection."""
        await self._checks.enter_graceful_shutdown()
        try:
            await asyncio.wait_for(self._service.drain(), grace)
        except TimeoutError:
            _log.warning("stopping with requests unanswered after %g s", grace)
        await self._server.stop(0)
        await self._service.scheduler.close()


async def start_server(
    backend: TeacherBackend,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    access: ServerAccess | None = None,
    batch_tokens: int = 2048,
    max_inflight_bytes: int = 256 * 2**20,
) -> RunningServer:
    """Serve ``backend`` on the running event loop.

    Parameters
    ----------
    host : an address of this machine; other than loopback only with TLS and a token.
    port : 0 takes a free one, see ``RunningServer.port``.
    access : certificates and tokens; None is plain text, for everyone on this machine.
    batch_tokens : packed tokens of one call of the backend, prompts included.
    max_inflight_bytes : answers made but not yet taken by one client.

    Raises
    ------
    ConfigError : a host that needs more than ``access`` holds, or a port that cannot be had.
    """
    access = access or ServerAccess()
    access.require_safe(host)
    server = grpc.aio.server(interceptors=[TokenCheck(access)], options=_SERVER_OPTIONS)
    service = _TeacherService(backend, Scheduler(backend, batch_tokens=batch_tokens, max_inflight_bytes=max_inflight_bytes))
    checks = health.HealthServicer()
    teacher_pb2_grpc.add_TeacherServiceServicer_to_server(service, server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    address, credentials = f"[{host}]:{port}" if ":" in host else f"{host}:{port}", access.credentials()
    try:
        bound = server.add_insecure_port(address) if credentials is None else server.add_secure_port(address, credentials)
    except RuntimeError as error:
        await service.scheduler.close()
        raise ConfigError(
            f"cannot serve on {host}:{port}: the port is taken or not allowed; choose another, or 0 for a free one"
        ) from error
    await server.start()
    for name in ("", SERVICE):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return RunningServer(server, service, checks, host, bound)


class _TeacherService(teacher_pb2_grpc.TeacherServiceServicer):
    def __init__(self, backend: TeacherBackend, scheduler: Scheduler) -> None:
        self.info = backend.info
        self.scheduler = scheduler
        self.is_draining = False
        self._calls: set[_Outcomes] = set()

    async def GetInfo(self, request: pb.GetInfoRequest, context: grpc.aio.ServicerContext) -> pb.GetInfoResponse:  # noqa: N802
        return encode_info(self.info)

    async def Score(  # noqa: N802
        self, requests: AsyncIterator[pb.ScoreRequest], context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ScoreResponse]:
        await self._admit(context)
        stream = _ScoreStream(self, requests)
        self._calls.add(stream)
        try:
            async with aclosing(stream.responses()) as responses:
                async for response in responses:
                    yield response
        except _ProtocolError as error:
            await context.abort(error.code, str(error))
        finally:
            self._calls.discard(stream)
            await stream.close()

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        await self._admit(context)
        call = _Generation(self)
        self._calls.add(call)
        try:
            async with aclosing(call.responses(request)) as responses:
                async for response in responses:
                    yield response
        except _ProtocolError as error:
            await context.abort(error.code, str(error))
        finally:
            self._calls.discard(call)
            await call.close()

    async def drain(self) -> None:
        """Refuse what is new and wait until all that was taken is answered."""
        self.is_draining = True
        for call in tuple(self._calls):
            call.end_if_done()
        while self._calls:
            await asyncio.sleep(0.02)

    async def _admit(self, context: grpc.aio.ServicerContext) -> None:
        if self.is_draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down")
        if len(self._calls) >= _CALLS:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the teacher already has {_CALLS} calls open: try again later")


class _ProtocolError(Exception):
    """A client that does not keep to the protocol, or a stream that cannot go on: ends the call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str) -> None:
        super().__init__(message)
        self.code = code


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise _ProtocolError(grpc.StatusCode.FAILED_PRECONDITION, f"protocol {version} is not spoken here, {PROTOCOL_VERSION} is")


def _refusal(error: ValueError | RefusedError) -> RefusedError:
    return error if isinstance(error, RefusedError) else RefusedError("invalid", str(error))


class _Outcomes:
    """What one call waits for, and what is ready to be sent to it."""

    def __init__(self, service: _TeacherService) -> None:
        self._service = service
        self._scheduler = service.scheduler
        self._client = service.scheduler.add_client()
        self._unanswered = 0
        self._takes_more = True
        self._ready: asyncio.Queue[Any] = asyncio.Queue()

    def end_if_done(self) -> None:
        """Wake the sending side where nothing can come any more."""
        if self._unanswered == 0 and (self._service.is_draining or not self._takes_more):
            self._ready.put_nowait(None)

    async def close(self) -> None:
        self._scheduler.drop_client(self._client)

    def _answered(self) -> None:
        self._unanswered -= 1
        self.end_if_done()


class _ScoreStream(_Outcomes):
    """One open `Score` call: a task reads requests into the scheduler; `responses` gives what is ready, as credit allows."""

    def __init__(self, service: _TeacherService, requests: AsyncIterator[pb.ScoreRequest]) -> None:
        super().__init__(service)
        self._requests = requests
        self._answer_credit = 0
        self._request_credit = _REQUEST_WINDOW
        self._owed_credit = 0  # taken and not yet given back
        self._credited = asyncio.Event()
        self._open_ids: set[int] = set()
        self._reader = asyncio.create_task(self._read())

    async def responses(self) -> AsyncGenerator[pb.ScoreResponse, None]:
        yield pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=PROTOCOL_VERSION, request_credit_bytes=_REQUEST_WINDOW))
        while True:
            ready = await self._ready.get()
            if ready is None:
                if self._takes_more:
                    raise _ProtocolError(grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down")
                return
            if isinstance(ready, Exception):
                raise ready
            if isinstance(ready, pb.ScoreResponse):
                yield ready
                continue
            request_id, size, chunks = ready
            for response, payload in chunks:
                while self._answer_credit <= 0:
                    self._credited.clear()
                    await self._credited.wait()
                self._answer_credit -= payload
                yield response
            self._finish(request_id, size)

    async def close(self) -> None:
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await super().close()

    async def _read(self) -> None:
        """Take requests until the client has no more, or breaks the rules."""
        try:
            is_open = False
            async for request in self._requests:
                kind = request.WhichOneof("kind")
                if (kind == "open") == is_open:
                    raise _ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, "a stream is opened once, by its first message")
                if kind == "open":
                    is_open = True
                    _check_version(request.open.protocol_version)
                    self._credit(request.open.answer_credit_bytes)
                elif kind == "credit":
                    self._credit(request.credit.bytes)
                else:
                    self._take(request.item)
            self._takes_more = False
            self.end_if_done()
        except Exception as error:
            self._ready.put_nowait(error)

    def _credit(self, count: int) -> None:
        self._answer_credit += count
        self._credited.set()

    def _take(self, item: pb.ScoreItem) -> None:
        payload = len(item.token_ids.data) + len(item.candidate_ids.data)
        if self._request_credit <= 0:
            raise _ProtocolError(grpc.StatusCode.RESOURCE_EXHAUSTED, "an item was sent without credit for it")
        if item.request_id in self._open_ids:
            raise _ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, f"request_id {item.request_id} is already in use on this stream")
        self._request_credit -= payload
        self._open_ids.add(item.request_id)
        self._unanswered += 1
        try:
            rollout, want, resume_from = decode_item(item)
            if self._service.is_draining:
                raise RefusedError("unavailable", "the teacher is shutting down", is_retryable=True, retry_after=1.0)
            check_want(want, self._service.info)
            check_rollout(rollout, want, self._service.info)
        except (ValueError, RefusedError) as error:
            self._fail(item.request_id, _refusal(error))
            self._give_credit(payload)
            return
        self._submit(item.request_id, rollout, want, resume_from, payload)

    def _submit(self, request_id: int, rollout: Rollout, want: SignalSpec, resume_from: int, payload: int) -> None:
        size = answer_bytes(rollout, want, self._service.info.vocab_size)

        def deliver(answer: Answer) -> None:
            if isinstance(answer, TeacherSignal):
                chunks: Iterator[tuple[pb.ScoreResponse, int]]
                info = self._service.info
                chunks = signal_chunks(request_id, rollout, answer, info.vocab_size, resume_from, info.weights_version)
                self._ready.put_nowait((request_id, size, chunks))
            elif isinstance(answer, RefusedError):
                self._scheduler.release(self._client, size)
                self._fail(request_id, answer)
            self._give_credit(payload)

        self._scheduler.submit(self._client, Job(want, rollout, len(rollout.all_ids), size, deliver))

    def _give_credit(self, count: int) -> None:
        """Give back what a request took; sent in larger steps, since a message costs more than a small request."""
        self._owed_credit += count
        if self._owed_credit >= _REQUEST_WINDOW // 8:
            self._request_credit += self._owed_credit
            self._ready.put_nowait(pb.ScoreResponse(credit=pb.Credit(bytes=self._owed_credit)))
            self._owed_credit = 0

    def _fail(self, request_id: int, error: RefusedError) -> None:
        self._ready.put_nowait(pb.ScoreResponse(failure=encode_failure(request_id, error)))
        self._open_ids.discard(request_id)
        self._answered()

    def _finish(self, request_id: int, size: int) -> None:
        self._scheduler.release(self._client, size)
        self._open_ids.discard(request_id)
        self._answered()


class _Generation(_Outcomes):
    """One `Generate` call: all its prompts go to the scheduler at once, and come back as each is answered."""

    async def responses(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        _check_version(request.protocol_version)
        sampling = decode_sampling(request.sampling)
        try:
            check_sampling(sampling, self._service.info)
        except RefusedError as error:
            raise _ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        self._unanswered = len(request.prompts)
        self._takes_more = False
        for message in request.prompts:
            try:
                prompt = decode_prompt(message)
                check_prompt(prompt, sampling, self._service.info)
            except (ValueError, RefusedError) as error:
                self._deliver(message.request_id, _refusal(error))
                continue
            tokens = len(prompt.token_ids) + sampling.max_new_tokens

            def deliver(answer: Answer, request_id: int = message.request_id) -> None:
                self._deliver(request_id, answer)

            self._scheduler.submit(self._client, Job(sampling, prompt, tokens, 0, deliver))
        self.end_if_done()
        while (ready := await self._ready.get()) is not None:
            yield ready

    def _deliver(self, request_id: int, answer: Answer) -> None:
        if isinstance(answer, Completion):
            message = encode_completion(request_id, answer, self._service.info.weights_version)
            self._ready.put_nowait(pb.GenerateResponse(completion=message))
        elif isinstance(answer, RefusedError):
            self._ready.put_nowait(pb.GenerateResponse(failure=encode_failure(request_id, answer)))
        self._answered()
