"""One `Score` stream to one replica: kept open while there is work, opened again where it breaks, written to by one task alone.

What is asked and what becomes of the answers is the session's business (`ScoreSession`); here are the wire's rules: credits both
ways, no message that does not belong, no silence beyond the time allowed. A stream that breaks gives its items back.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.answers import SignalAssembler, payload_bytes
from bbopd.rpc.batches import BATCH_BYTES, BATCH_MESSAGES, add_part, parts_of
from bbopd.rpc.channel import MESSAGE_BYTES, describe
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_failure, fill_item
from bbopd.teachers.endpoint import Endpoint, pushback_seconds
from bbopd.types import Rollout, SignalSpec

__all__ = ["Item", "ScoreStream"]

_GREETING_SECONDS = 30.0  # to say who it is and to accept a stream; a model is not asked for either
_ASKED_AGAIN = 3  # times that one item is, on open streams
_REFUSALS = (
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
)


@dataclass(eq=False, slots=True)
class Item:
    """One rollout that is not answered yet, the ``place``-th of the source."""

    place: int
    rollout: Rollout
    assembler: SignalAssembler
    tokens: int
    failures: int = 0
    """Answers that were bad, and refusals that were not for want of room."""
    breaks: int = 0
    """Streams that broke on it, one after the other, without a row of it arriving."""
    asked_again: int = 0
    """Times it was asked once more on an open stream that said nothing of it."""
    failed_last: bool = False
    """Whether it waits for such a failure, not for room."""
    not_before: float = 0.0
    failed_at: set[Endpoint] = field(default_factory=set)
    sent_from: int = -1
    """The row asked for first on its present stream; -1 where it is not sent."""

    @property
    def request_bytes(self) -> int:
        """What asking for it takes of the replica's credit."""
        return len(self.assembler.packed) + self.assembler.candidate_bytes


class Owner(Protocol):
    """What a stream needs of its session."""

    want: SignalSpec
    counters: Counter[str]

    def has_work(self) -> bool: ...
    def is_waiting_for_caller(self) -> bool: ...
    def new_request_id(self) -> int: ...
    def replay_id(self, item: Item) -> str: ...
    def was_made(self, request_id: int) -> bool: ...
    def take_rows(self) -> None: ...
    def take_answer(self, item: Item) -> None: ...
    def take_failure(self, endpoint: Endpoint, item: Item, error: TeacherError) -> None: ...
    def take_back(self, endpoint: Endpoint, items: list[Item]) -> None: ...
    def notify(self) -> None: ...
    async def until(self, is_true: Callable[[], bool]) -> None: ...
    def lost(self, what: str) -> TeacherError: ...


class _BrokenError(Exception):
    """The stream is of no more use; the replica may be."""


class ScoreStream:
    """Talks to one replica for one session.

    Parameters
    ----------
    window : bytes of answers that may be on their way.
    patience : seconds without a message, while answers are due, before the stream is given up.
    inflight_tokens : tokens (prompts included) sent and not yet answered; a single longer rollout still goes, alone.
    """

    def __init__(self, endpoint: Endpoint, owner: Owner, *, window: int, patience: float, inflight_tokens: int) -> None:
        self.endpoint = endpoint
        self.endpoint.refusal = ""
        self.limit = min(inflight_tokens, endpoint.info.max_request_tokens or inflight_tokens)
        self._owner = owner
        self._window = window
        self._patience = patience
        self._is_open = False
        self._takes_batches = False
        self._tokens = 0
        self._items: dict[int, Item] = {}
        self._unsent: list[tuple[int, int]] = []  # heap of (place, request number): what is sent goes in the order of the source
        self._request_credit = 0
        self._owed_credit = 0  # bytes read and not yet granted again
        self._silence = 0.0  # seconds without a message while some are due

    @property
    def is_ready(self) -> bool:
        return self._is_open and not self.endpoint.rest_seconds

    def has_room(self, tokens: int) -> bool:
        """Whether an item may be given. After a failure items go one at a time, until one is answered."""
        if self.endpoint.faults:
            return not self._items
        return self._tokens == 0 or self._tokens + tokens <= self.limit

    def give(self, item: Item) -> None:
        """Queue an item to be sent; the session's `notify`, in which it is given, wakes the sender."""
        request_id = self._owner.new_request_id()
        self._items[request_id] = item
        self._tokens += item.tokens
        self.endpoint.inflight_tokens += item.tokens
        heapq.heappush(self._unsent, (item.place, request_id))

    async def keep(self) -> None:
        """Keep a stream open while there is work. Raises `TeacherError` where the replica is another teacher now."""
        try:
            while not self.endpoint.refusal:
                await self._owner.until(self._owner.has_work)
                await asyncio.sleep(self.endpoint.rest_seconds)
                retry_after = 0.0
                try:
                    await self._use()
                    trouble = "it ended the stream"
                except grpc.aio.AioRpcError as error:
                    trouble, retry_after = describe(error), pushback_seconds(error)
                    if error.code() in _REFUSALS:
                        self.endpoint.refusal = trouble
                except _BrokenError as error:
                    trouble = str(error)
                self.endpoint.note_failure(trouble, retry_after)
                self._owner.counters["reconnects"] += 1
                self._owner.take_back(self.endpoint, self._release_all())
        finally:
            self._release_all()

    async def _use(self) -> None:
        """Open a stream and read until it ends or breaks, while another task writes."""
        greeting_seconds = min(_GREETING_SECONDS, self._patience)
        await self.endpoint.check_identity(greeting_seconds)
        call = self.endpoint.stub.Score()
        try:
            try:
                opening = pb.StreamOpen(protocol_version=PROTOCOL_VERSION, answer_credit_bytes=self._window, takes_batches=True)
                first = await asyncio.wait_for(_ask(call, pb.ScoreRequest(open=opening)), greeting_seconds)
            except TimeoutError:
                raise _BrokenError(f"it has not accepted a stream within {greeting_seconds:g} s") from None
            if first is grpc.aio.EOF:
                return
            if first.WhichOneof("kind") != "accept" or first.accept.protocol_version != PROTOCOL_VERSION:
                raise _BrokenError("it did not accept the stream: it speaks another protocol")
            self._request_credit = first.accept.request_credit_bytes
            self._takes_batches = first.accept.takes_batches
            self._owed_credit = 0
            self._is_open = True
            self._owner.notify()
            await self._read_while_sending(call)
        finally:
            self._is_open = False
            call.cancel()

    async def _send(self, call: Any) -> None:
        """All writes of one stream."""
        while True:
            await self._owner.until(lambda: self._grantable() > 0 or self._may_ask())
            await call.write(self._pack())

    def _may_ask(self) -> bool:
        return bool(self._unsent) and self._request_credit > 0

    def _pack(self) -> pb.ScoreRequest:
        """What is to be sent, in one message where the replica takes that: a credit first, then items as its own credit allows."""
        request = pb.ScoreRequest()
        room = BATCH_MESSAGES if self._takes_batches else 1
        packed_bytes = 0
        if grant := self._grantable():
            add_part(request, self._takes_batches).credit.bytes = grant
            self._owed_credit = 0
            room -= 1
        while room > 0 and self._may_ask():
            _, request_id = self._unsent[0]
            item = self._items[request_id]
            if packed_bytes and packed_bytes + item.request_bytes > BATCH_BYTES:
                break
            heapq.heappop(self._unsent)
            assembler, item.sent_from = item.assembler, item.assembler.position
            message, replay_id = add_part(request, self._takes_batches).item, self._owner.replay_id(item)
            fill_item(message, request_id, item.rollout, self._owner.want, item.sent_from, replay_id, assembler.packed)
            self._request_credit -= item.request_bytes
            packed_bytes += item.request_bytes
            room -= 1
        return request

    def _grantable(self) -> int:
        """Bytes to grant now: in larger steps, and none while the caller leaves answers untaken."""
        return self._owed_credit if self._owed_credit >= self._window // 8 and not self._owner.is_waiting_for_caller() else 0

    async def _read_while_sending(self, call: Any) -> None:
        """Take messages until the stream ends. A caller that blocks the event loop does not count as silence of the replica."""
        reader, sender = asyncio.create_task(self._read(call)), asyncio.create_task(self._send(call))
        poll = min(1.0, self._patience / 16)  # that much less than patience may be enough, as messages do not move the ticks
        self._silence = 0.0
        try:
            while not reader.done():
                waits_for = {reader} if sender.done() else {reader, sender}
                done, _ = await asyncio.wait(waits_for, timeout=poll, return_when=asyncio.FIRST_COMPLETED)
                if sender.done():
                    _raise_unless_call_ended(sender)
                if done:
                    continue
                is_due = bool(self._items) and not self._owner.is_waiting_for_caller()
                self._silence = self._silence + poll if is_due else 0.0
                if self._silence - poll < self._patience / 2 <= self._silence:
                    self._ask_again(min(self._items, default=0))
                if self._silence >= self._patience:
                    raise _BrokenError(f"it has not answered for {self._patience:g} s")
            reader.result()
        finally:
            for task in (reader, sender):
                task.cancel()
            await asyncio.gather(reader, sender, return_exceptions=True)

    async def _read(self, call: Any) -> None:
        while (message := await call.read()) is not grpc.aio.EOF:
            self._silence = 0.0
            self._take(message)

    # ------------------------------------------------------------ answers

    def _ask_again(self, request_id: int) -> None:
        """Of a silent replica, whether it has dropped the oldest item or is slow: an answer to the same question tells."""
        if request_id not in self._items or self._items[request_id].sent_from < 0:
            return
        item = self._release(request_id)
        item.asked_again += 1
        if item.asked_again > _ASKED_AGAIN:
            raise self._owner.lost(f"dropped rollout {item.rollout.rollout_id} {item.asked_again} times without a word")
        item.sent_from = -1
        self._owner.counters["asked_again"] += 1
        self.give(item)
        self._owner.notify()

    def _take(self, message: pb.ScoreResponse) -> None:
        try:
            parts = parts_of(message)
        except ValueError as error:
            raise self._violation(f"it sent {error}") from None
        for part in parts:
            self._take_part(part)
        self._owner.notify()

    def _take_part(self, message: pb.ScoreResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "credit":
            self._request_credit += message.credit.bytes
        elif kind == "failure":
            if self._is_asked(message.failure.request_id):
                item = self._release(message.failure.request_id)
                self._owner.take_failure(self.endpoint, item, decode_failure(message.failure))
        elif kind == "chunk":
            self._take_chunk(message.chunk)
        else:
            raise self._violation(f"it sent {kind or 'nothing'} in the middle of a stream")

    def _take_chunk(self, chunk: pb.SignalChunk) -> None:
        self._owed_credit += min(payload_bytes(chunk), MESSAGE_BYTES)  # a shape may lie
        if not self._is_asked(chunk.request_id):
            return
        item = self._items[chunk.request_id]
        if chunk.weights_version != self.endpoint.info.weights_version:
            raise self._owner.lost(
                f"answered with weights version {chunk.weights_version}, at the start it had {self.endpoint.info.weights_version}: "
                "it is another teacher now, and a run cannot change its teacher; begin a new run"
            )
        try:
            item.assembler.add(chunk)
        except BadAnswerError as error:
            self._release(chunk.request_id)
            self._owner.take_failure(self.endpoint, item, error)
            return
        item.breaks = 0
        self._owner.take_rows()
        if item.assembler.is_complete:
            self._release(chunk.request_id)
            self.endpoint.note_success()
            self._owner.take_answer(item)
            if item.asked_again:  # not slow, then: what was asked before it has been dropped as well
                for dropped in [number for number in self._items if number < chunk.request_id]:
                    self._ask_again(dropped)

    def _is_asked(self, request_id: int) -> bool:
        """False for what still comes of an answer given up, or comes twice."""
        if not self._owner.was_made(request_id):
            raise self._violation(f"it answered request {request_id}, which was never made")
        return request_id in self._items

    def _violation(self, what: str) -> _BrokenError:
        self._owner.counters["bad_answers"] += 1
        return _BrokenError(what)

    def _release(self, request_id: int) -> Item:
        item = self._items.pop(request_id)
        self._tokens -= item.tokens
        self.endpoint.inflight_tokens -= item.tokens
        if item.sent_from < 0:
            self._unsent = [entry for entry in self._unsent if entry[1] != request_id]
            heapq.heapify(self._unsent)
        return item

    def _release_all(self) -> list[Item]:
        items = [self._release(request_id) for request_id in list(self._items)]
        self._unsent.clear()
        return items


async def _ask(call: Any, request: pb.ScoreRequest) -> Any:
    await call.write(request)
    return await call.read()


def _raise_unless_call_ended(sender: asyncio.Task[None]) -> None:
    """Where writing failed because the call has ended, reading says why; anything else is ours to tell."""
    error = sender.exception()
    if error is not None and not isinstance(error, grpc.RpcError | asyncio.InvalidStateError):
        raise error
