"""An open `Score` call: items are checked and taken, wait for the model, and go back in chunks as credit allows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.answers import SignalCutter, answer_bytes
from bbopd.rpc.batches import BATCH_BYTES, BATCH_MESSAGES, joined, parts_of
from bbopd.rpc.calls import Item, OpenCall, Outcome, ProtocolError, Served, check_version, refusal
from bbopd.rpc.clients import Client
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_item, decode_replay_id, encode_failure, input_sha256, peek_level
from bbopd.rpc.jobs import Answer
from bbopd.rpc.limits import RefusedError, check_rollout, check_want
from bbopd.rpc.pieces import Pieces, inside
from bbopd.types import Prompt, Rollout, TeacherSignal

__all__ = ["ScoreStream"]

_REQUEST_WINDOW = 8 * 2**20  # bytes of token ids one stream may have sent and the model not yet taken


class ScoreStream(OpenCall):
    """An open `Score` call: a task reads requests into the scheduler; `responses` gives what is ready, as credit allows."""

    kind = "score"

    def __init__(self, served: Served, client: Client, owner: str, requests: AsyncIterator[pb.ScoreRequest]) -> None:
        super().__init__(served, client, owner)
        self._requests = requests
        self._answer_credit = 0
        self._request_credit = _REQUEST_WINDOW
        self._owed_credit = 0  # taken and not yet given back
        self._packs = False  # whether the client takes batches
        self._reader = asyncio.create_task(self._read())

    async def responses(self) -> AsyncGenerator[bytes, None]:
        """Each a `ScoreResponse`."""
        accept = pb.StreamAccept(protocol_version=PROTOCOL_VERSION, request_credit_bytes=_REQUEST_WINDOW, takes_batches=True)
        yield pb.ScoreResponse(accept=accept).SerializeToString()
        while (packed := await self._next()) is not None:
            response, finished = packed
            yield response
            for outcome in finished:
                self._finish(outcome)
            self.end_if_done()

    async def _next(self) -> tuple[bytes, list[Outcome]] | None:
        """The next message, as soon as something is ready and credit allows it, and what it finishes; None at the end of the stream."""
        while True:
            if self._ready:
                first = self._ready[0]
                if isinstance(first, Exception):
                    raise first
                if first is None and self._takes_more:
                    raise ProtocolError(grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down", 1.0)
                if first is None:
                    return None
                if self._may_send(0):
                    return self._pack()
            self._changed.clear()
            await self._changed.wait()

    def _may_send(self, packed_bytes: int) -> bool:
        """Whether what is first can be sent, beside so much payload in the same message."""
        ready = self._ready[0]
        if not isinstance(ready, Outcome):
            return isinstance(ready, pb.Credit)
        if ready.rows is None:
            return True
        return self._answer_credit > 0 and (not packed_bytes or packed_bytes + ready.rows.next_bytes <= BATCH_BYTES)

    def _pack(self) -> tuple[bytes, list[Outcome]]:
        """What is ready, in one message where the client takes that, and what it finishes."""
        parts: list[Pieces] = []
        finished: list[Outcome] = []
        packed_bytes = 0
        for _ in range(BATCH_MESSAGES if self._packs else 1):
            if not self._ready or not self._may_send(packed_bytes):
                break
            ready = self._ready[0]
            if isinstance(ready, pb.Credit):
                parts.append([pb.ScoreResponse(credit=ready).SerializeToString()])
                self._ready.popleft()
                continue
            if ready.rows is None:
                parts.append([pb.ScoreResponse(failure=ready.message).SerializeToString()])
            else:
                payload = ready.rows.next_bytes
                parts.append(inside(pb.ScoreResponse.CHUNK_FIELD_NUMBER, ready.rows.cut()))
                packed_bytes += payload
                self._answer_credit -= payload
                self._served.observer.sent(ready.item.level, payload)
            if ready.rows is None or ready.rows.is_done:
                finished.append(self._ready.popleft())
        return joined(parts, is_batch=self._packs), finished

    def _finish(self, outcome: Outcome) -> None:
        self._served.scheduler.release(self._call, outcome.size)
        self._retire(outcome.item, outcome.outcome)
        self._give_credit(0 if outcome.rows is not None else outcome.item.request_bytes)

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
                    check_version(request.open.protocol_version)
                    self._packs = request.open.takes_batches
                    self._credit(request.open.answer_credit_bytes)
                    continue
                try:
                    parts = parts_of(request)
                except ValueError as error:
                    raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, str(error)) from None
                for part in parts:
                    self._hear(part)
            self._takes_more = False
            self.end_if_done()
        except Exception as error:
            self._put(error)

    def _hear(self, request: pb.ScoreRequest) -> None:
        kind = request.WhichOneof("kind")
        if kind == "credit":
            self._credit(request.credit.bytes)
        elif kind == "item":
            self._take(request.item)
        else:
            raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, f"{kind or 'nothing'} was sent where an item or credit belongs")

    def _credit(self, count: int) -> None:
        self._answer_credit += count
        self._changed.set()

    def _take(self, message: pb.ScoreItem) -> None:
        packed = message.token_ids.data
        payload = len(packed) + len(message.candidate_ids.data)
        if self._request_credit <= 0:
            raise ProtocolError(grpc.StatusCode.RESOURCE_EXHAUSTED, "an item was sent without credit for it")
        item = Item(message.request_id, "item", peek_level(message.want.level), payload)
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
            self._fail(item, refusal(error), 0)

    def _deliver(self, item: Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        if isinstance(answer, RefusedError):
            self._fail(item, answer, size)
            return
        assert isinstance(payload, Rollout)
        assert isinstance(answer, TeacherSignal)
        info = self._served.info
        rows = SignalCutter(item.request_id, payload, answer, info.vocab_size, resume_from, info.weights_version, item.digest)
        self._put(Outcome(item, "ok", rows=rows, size=size))
        self._give_credit(item.request_bytes)

    def _fail(self, item: Item, error: RefusedError, size: int) -> None:
        """Its credit comes back once the failure is sent: who sends nonsense and reads nothing soon has none left."""
        self._put(Outcome(item, error.code, encode_failure(item.request_id, error), size=size))

    def _give_credit(self, count: int) -> None:
        """Give back what a request took; sent in larger steps, since a message costs more than a small request."""
        self._owed_credit += count
        if self._owed_credit >= _REQUEST_WINDOW // 8:
            self._request_credit += self._owed_credit
            self._put(pb.Credit(bytes=self._owed_credit))
            self._owed_credit = 0
