"""One open call of one client: items are checked and taken, wait for the model, and go back in chunks as credit allows."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.answers import answer_bytes, signal_chunks
from bbopd.rpc.backend import TeacherBackend, with_ids
from bbopd.rpc.clients import Client, Clients
from bbopd.rpc.codec import (
    PROTOCOL_VERSION,
    decode_item,
    decode_prompt,
    decode_replay_id,
    decode_sampling,
    encode_completion,
    encode_failure,
    input_sha256,
    peek_level,
)
from bbopd.rpc.jobs import Answer, Job
from bbopd.rpc.limits import RefusedError, check_prompt, check_rollout, check_sampling, check_want
from bbopd.rpc.observe import Observer, client_hash
from bbopd.rpc.replay import ReplayStore, body_sha256
from bbopd.rpc.scheduler import Scheduler
from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["Generation", "ProtocolError", "ScoreStream", "Served"]

_REQUEST_WINDOW = 8 * 2**20  # bytes of token ids one stream may have sent and the model not yet taken
_call_numbers = itertools.count(1)


class ProtocolError(Exception):
    """A client that does not keep to the protocol, or a stream that cannot go on: ends the call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


@dataclass(eq=False, slots=True)
class Served:
    """What all calls of a server share."""

    info: TeacherInfo
    scheduler: Scheduler
    clients: Clients
    replays: ReplayStore
    observer: Observer
    backend: TeacherBackend
    is_draining: bool = False


@dataclass(eq=False, slots=True)
class _Item:
    """One item from its arrival until it is answered."""

    request_id: int
    name: str
    level: str
    request_bytes: int
    prompt_tokens: int = 0
    tokens: int = 0
    """Of the answer; at most, until it is written."""
    inflight_tokens: int = 0
    """What it counts for among its client's: 0 until it was taken."""
    digest: bytes = b""
    """`input_sha256` of a rollout."""
    arrived_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What ends an item, ready to be sent: its message, or its chunks one by one."""

    item: _Item
    outcome: str
    message: Any = None
    chunks: Iterator[tuple[pb.ScoreResponse, int]] | None = None
    size: int = 0


class _Call:
    """What a call waits for, and what is ready to be sent to it."""

    kind = ""

    def __init__(self, served: Served, client: Client, owner: str) -> None:
        self._served = served
        self._client = client
        self._owner = owner
        self._client_hash = client_hash(client.name)
        self._number = next(_call_numbers)
        self._call = served.scheduler.open_call(client)
        self._open: dict[int, _Item] = {}
        self._takes_more = True
        self._ready: asyncio.Queue[Any] = asyncio.Queue()
        self._opened_at = time.monotonic()
        served.observer.call_opened(self.kind, self._client_hash, self._number)

    def end_if_done(self) -> None:
        """Wake the sending side where nothing can come any more."""
        if not self._open and (self._served.is_draining or not self._takes_more):
            self._ready.put_nowait(None)

    def end(self, error: ProtocolError) -> None:
        """End the call with a status, once what is ready has been sent."""
        self._ready.put_nowait(error)

    async def close(self) -> None:
        """Give up what is unanswered: the model will not be asked for a client that has gone."""
        dropped = len(self._open)
        for item in tuple(self._open.values()):
            self._retire(item, "dropped")
        self._served.scheduler.close_call(self._call)
        self._served.observer.call_closed(self.kind, self._client_hash, self._number, time.monotonic() - self._opened_at, dropped)

    def _accept(self, item: _Item) -> None:
        if item.request_id in self._open:
            raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, f"request_id {item.request_id} is already in use in this call")
        most = self._client.limits.items
        if len(self._open) >= most:
            raise ProtocolError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {most} items are unanswered: send fewer at a time", 1.0)
        self._open[item.request_id] = item

    def _submit(
        self, item: _Item, kind: SignalSpec | Sampling, payload: Rollout | Prompt, size: int, replay_id: str, resume_from: int
    ) -> None:
        """Count a checked item as in flight and let the model, or the memory of its answer, answer it."""
        if self._served.is_draining:
            raise RefusedError("unavailable", "the teacher is shutting down", is_retryable=True, retry_after=1.0)
        tokens = item.prompt_tokens + item.tokens
        self._client.take(item.name, tokens, item.request_bytes, self._retry_after())
        item.inflight_tokens = tokens
        body = body_sha256(kind, payload, item.digest) if replay_id else b""

        def deliver(answer: Answer) -> None:
            if replay_id and not isinstance(answer, RefusedError):
                self._served.replays.keep(self._owner, replay_id, body, answer)  # its client may be gone, and come back for it
            if self._call.is_open:
                self._deliver(item, payload, size, resume_from, answer)

        if replay_id and (known := self._served.replays.find(self._owner, replay_id, body)) is not None:
            self._served.observer.replayed(item.level)
            self._deliver(item, payload, 0, resume_from, known)
            return
        self._served.scheduler.submit(self._call, Job(kind, payload, tokens, size, deliver, is_kept=bool(replay_id)))

    def _retry_after(self) -> float:
        """Until about half of what its client has in flight is answered."""
        return min(30.0, max(0.1, self._served.scheduler.seconds_for(self._client.tokens // 2)))

    def _retire(self, item: _Item, outcome: str) -> None:
        del self._open[item.request_id]
        if item.inflight_tokens:
            self._client.give_back(item.inflight_tokens, item.request_bytes)
        self._served.observer.item_ended(
            outcome,
            level=item.level,
            client=self._client_hash,
            call=self._number,
            request=item.request_id,
            name=item.name,
            prompt_tokens=item.prompt_tokens,
            tokens=item.tokens,
            seconds=time.monotonic() - item.arrived_at,
        )

    def _deliver(self, item: _Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        raise NotImplementedError


class ScoreStream(_Call):
    """An open `Score` call: a task reads requests into the scheduler; `responses` gives what is ready, as credit allows."""

    kind = "score"

    def __init__(self, served: Served, client: Client, owner: str, requests: AsyncIterator[pb.ScoreRequest]) -> None:
        super().__init__(served, client, owner)
        self._requests = requests
        self._answer_credit = 0
        self._request_credit = _REQUEST_WINDOW
        self._owed_credit = 0  # taken and not yet given back
        self._credited = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def responses(self) -> AsyncGenerator[pb.ScoreResponse, None]:
        yield pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=PROTOCOL_VERSION, request_credit_bytes=_REQUEST_WINDOW))
        while True:
            ready = await self._ready.get()
            if ready is None:
                if self._takes_more:
                    raise ProtocolError(grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down", 1.0)
                return
            if isinstance(ready, Exception):
                raise ready
            if isinstance(ready, pb.ScoreResponse):
                yield ready
                continue
            if ready.chunks is None:
                yield ready.message
            else:
                for response, payload in ready.chunks:
                    while self._answer_credit <= 0:
                        self._credited.clear()
                        await self._credited.wait()
                    self._answer_credit -= payload
                    yield response
                    self._served.observer.sent(ready.item.level, payload)
            self._served.scheduler.release(self._call, ready.size)
            self._retire(ready.item, ready.outcome)
            self._give_credit(0 if ready.chunks is not None else ready.item.request_bytes)
            self.end_if_done()

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
                    raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, "a stream is opened once, by its first message")
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

    def _take(self, message: pb.ScoreItem) -> None:
        packed = message.token_ids.data
        payload = len(packed) + len(message.candidate_ids.data)
        if self._request_credit <= 0:
            raise ProtocolError(grpc.StatusCode.RESOURCE_EXHAUSTED, "an item was sent without credit for it")
        item = _Item(message.request_id, "item", peek_level(message.want.level), payload)
        self._accept(item)
        self._request_credit -= payload
        info = self._served.info
        try:
            self._client.count_request(f"item {item.request_id}")
            rollout, want, resume_from = decode_item(message)
            replay_id = decode_replay_id(message.replay_id)
            item.name = f"rollout {rollout.rollout_id}"
            item.prompt_tokens, item.tokens = len(rollout.prompt.token_ids), len(rollout)
            check_want(want, info)
            check_rollout(rollout, want, info)
            item.digest = input_sha256(rollout, want, packed)
            self._submit(item, want, rollout, answer_bytes(rollout, want, info.vocab_size), replay_id, resume_from)
        except (ValueError, RefusedError) as error:
            self._fail(item, _refusal(error), 0)

    def _deliver(self, item: _Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        if isinstance(answer, RefusedError):
            self._fail(item, answer, size)
            return
        assert isinstance(payload, Rollout)
        assert isinstance(answer, TeacherSignal)
        info = self._served.info
        chunks = signal_chunks(item.request_id, payload, answer, info.vocab_size, resume_from, info.weights_version, item.digest)
        self._ready.put_nowait(_Outcome(item, "ok", chunks=chunks, size=size))
        self._give_credit(item.request_bytes)

    def _fail(self, item: _Item, error: RefusedError, size: int) -> None:
        """Its credit comes back once the failure is sent: who sends nonsense and reads nothing soon has none left."""
        message = pb.ScoreResponse(failure=encode_failure(item.request_id, error))
        self._ready.put_nowait(_Outcome(item, error.code, message, size=size))

    def _give_credit(self, count: int) -> None:
        """Give back what a request took; sent in larger steps, since a message costs more than a small request."""
        self._owed_credit += count
        if self._owed_credit >= _REQUEST_WINDOW // 8:
            self._request_credit += self._owed_credit
            self._ready.put_nowait(pb.ScoreResponse(credit=pb.Credit(bytes=self._owed_credit)))
            self._owed_credit = 0


class Generation(_Call):
    """A `Generate` call: all its prompts go to the scheduler at once, and come back as each is answered."""

    kind = "generate"

    async def responses(self, request: pb.GenerateRequest) -> AsyncGenerator[pb.GenerateResponse, None]:
        _check_version(request.protocol_version)
        sampling = decode_sampling(request.sampling)
        try:
            check_sampling(sampling, self._served.info)
        except RefusedError as error:
            raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
        for message in request.prompts:
            self._take(message, sampling)
        self._takes_more = False
        self.end_if_done()
        while (ready := await self._ready.get()) is not None:
            if isinstance(ready, ProtocolError):
                raise ready
            yield ready.message
            self._retire(ready.item, ready.outcome)
            self.end_if_done()

    def _take(self, message: pb.GeneratePrompt, sampling: Sampling) -> None:
        item = _Item(message.request_id, "prompt", "text", message.ByteSize())
        self._accept(item)
        try:
            self._client.count_request(f"item {item.request_id}")
            prompt, replay_id = decode_prompt(message), decode_replay_id(message.replay_id)
            item.name = f"prompt {prompt.prompt_id}"
            item.prompt_tokens, item.tokens = len(prompt.token_ids), sampling.max_new_tokens
            check_prompt(prompt, sampling, self._served.info)
            if prompt.is_text:
                prompt = with_ids(prompt, self._served.backend)
                item.prompt_tokens = len(prompt.token_ids)
                check_prompt(prompt, sampling, self._served.info)
            self._submit(item, sampling, prompt, 0, replay_id, 0)
        except (ValueError, RefusedError) as error:
            self._deliver(item, Prompt("", ()), 0, 0, _refusal(error))

    def _deliver(self, item: _Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        if isinstance(answer, RefusedError):
            failed = pb.GenerateResponse(failure=encode_failure(item.request_id, answer))
            self._ready.put_nowait(_Outcome(item, answer.code, failed))
            return
        assert isinstance(answer, Completion)
        item.tokens = len(answer.token_ids)
        written = pb.GenerateResponse(completion=encode_completion(item.request_id, answer, self._served.info.weights_version))
        self._ready.put_nowait(_Outcome(item, "ok", written))


def _check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(grpc.StatusCode.FAILED_PRECONDITION, f"protocol {version} is not spoken here, {PROTOCOL_VERSION} is")


def _refusal(error: ValueError | RefusedError) -> RefusedError:
    return error if isinstance(error, RefusedError) else RefusedError("invalid", str(error))
