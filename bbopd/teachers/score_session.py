"""One pass of rollouts through a remote teacher: sending within limits, taking answers, retrying, and outliving a broken stream.

Three tasks work side by side: one takes rollouts from the source as long as there is room, one keeps a stream open and reads
answers, and under it one does all the writing (gRPC allows a single writer). Whoever calls `ScoreSession.run` gets answers as
each is ready. Every wait ends: by an answer, by the stream breaking, or by the time limit.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.answers import SignalAssembler, payload_bytes
from bbopd.rpc.channel import describe
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_failure, encode_item
from bbopd.rpc.limits import check_rollout, check_want
from bbopd.types import Rollout, ScoredRollout, SignalSpec, TeacherInfo

__all__ = ["ScoreSession"]

_RETRIES = 3  # of one item
_RECONNECTS = 4  # in a row, without a single message between them
_FIRST_BACKOFF = 0.2  # seconds, doubled each time
_WINDOW = 64 * 2**20  # bytes of answers in flight, and again of answers ready and not yet taken by the caller


@dataclass(eq=False, slots=True)
class _Item:
    """One rollout that is not answered yet, the ``place``-th of the source."""

    place: int
    rollout: Rollout
    assembler: SignalAssembler
    retries: int = 0
    is_queued: bool = False
    is_sent: bool = False


@dataclass(frozen=True, slots=True)
class _Ready:
    scored: ScoredRollout
    payload: int


@dataclass(frozen=True, slots=True)
class _End:
    error: BaseException | None


class ScoreSession:
    """Scores one stream of rollouts.

    Parameters
    ----------
    open_stream : starts a `Score` call.
    target : how messages name the teacher.
    timeout : seconds without a message, while answers are due, before the teacher counts as dead.
    inflight_tokens : tokens (prompts included) sent and not yet answered; a single longer rollout still goes, alone.
    counters : ``retries``, ``bad_answers`` and ``reconnects`` are counted here.
    """

    def __init__(
        self,
        open_stream: Callable[[], Any],
        target: str,
        info: TeacherInfo,
        want: SignalSpec,
        *,
        timeout: float,
        inflight_tokens: int,
        counters: Counter[str],
    ) -> None:
        check_want(want, info)
        self._open_stream = open_stream
        self._target = target
        self._info = info
        self._want = want
        self._timeout = timeout
        self._inflight_tokens = min(inflight_tokens, info.max_request_tokens or inflight_tokens)
        self._counters = counters
        self._unanswered: dict[int, _Item] = {}
        self._unsent: list[tuple[int, int]] = []  # heap of (place, request number): what is sent goes in the order of the source
        self._next_id = 1
        self._next_place = 0
        self._tokens = 0  # sent and not answered
        self._source_ended = False
        self._scored = 0
        self._ready: asyncio.Queue[_Ready | _End] = asyncio.Queue()
        self._ready_bytes = 0
        self._owed_credit = 0  # bytes read and not yet granted again
        self._request_credit = 0
        self._silence = 0.0  # seconds waited since the last message; a caller that blocks the event loop does not add to it
        self._messages = 0
        self._changed = asyncio.Event()

    async def run(self, rollouts: AsyncIterator[Rollout]) -> AsyncGenerator[ScoredRollout, None]:
        """Answers as each is ready. Raises `TeacherError` naming what was finished; errors of the source pass through."""
        tasks = [asyncio.create_task(self._guard(self._feed(rollouts))), asyncio.create_task(self._guard(self._keep_stream()))]
        try:
            while True:
                ready = await self._ready.get()
                if isinstance(ready, _End):
                    if ready.error is not None:
                        raise ready.error
                    return
                self._ready_bytes -= ready.payload
                self._notify()
                yield ready.scored
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ from the source

    async def _feed(self, rollouts: AsyncIterator[Rollout]) -> None:
        async for rollout in rollouts:
            check_rollout(rollout, self._want, self._info)
            tokens = len(rollout.all_ids)
            await self._until(partial(self._has_room, tokens))
            if not self._unanswered:
                self._silence = 0.0
            self._tokens += tokens
            self._queue(self._ask(self._next_place, rollout, 0))
            self._next_place += 1
        self._source_ended = True
        self._end_if_done()

    def _has_room(self, tokens: int) -> bool:
        return self._tokens == 0 or self._tokens + tokens <= self._inflight_tokens

    def _ask(self, place: int, rollout: Rollout, retries: int) -> int:
        """Note a new request; `_queue` lets it be sent."""
        request_id = self._next_id
        self._next_id += 1
        name = f"request {request_id} (rollout {rollout.rollout_id})"
        self._unanswered[request_id] = _Item(place, rollout, SignalAssembler(rollout, self._want, self._info.vocab_size, name), retries)
        return request_id

    def _queue(self, request_id: int) -> None:
        item = self._unanswered.get(request_id)
        if item is not None and not item.is_queued and not item.is_sent:
            item.is_queued = True
            heapq.heappush(self._unsent, (item.place, request_id))
            self._notify()

    def _end_if_done(self) -> None:
        if self._source_ended and not self._unanswered:
            self._ready.put_nowait(_End(None))

    # ------------------------------------------------------------ the stream

    async def _keep_stream(self) -> None:
        """Keep a stream open while something is unanswered; open it again, a limited number of times, where it breaks."""
        breaks = 0
        while True:
            await self._until(lambda: bool(self._unanswered))
            messages = self._messages
            try:
                await self._use_stream()
                reason = "it ended the stream"
            except grpc.aio.AioRpcError as error:
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
                    raise self._lost(f"refused the stream: {describe(error)}") from None
                reason = describe(error)
            breaks = breaks + 1 if self._messages == messages else 1
            if breaks > _RECONNECTS:
                raise self._lost(f"is gone ({reason}; reconnecting failed {_RECONNECTS} times)")
            self._counters["reconnects"] += 1
            await asyncio.sleep(_FIRST_BACKOFF * 2 ** (breaks - 1))

    async def _use_stream(self) -> None:
        """Open a stream, send all that is unanswered, and read until the stream ends or breaks."""
        call = self._open_stream()
        self._silence = 0.0
        sender: asyncio.Task[None] | None = None
        try:
            opening = pb.ScoreRequest(open=pb.StreamOpen(protocol_version=PROTOCOL_VERSION, answer_credit_bytes=_WINDOW))
            try:
                await asyncio.wait_for(call.write(opening), self._timeout)
            except TimeoutError:
                raise self._lost(f"has not taken a connection for {self._timeout:g} s (teacher.timeout)") from None
            first = await self._read(call)
            if first is grpc.aio.EOF:
                return
            if first.WhichOneof("kind") != "accept" or first.accept.protocol_version != PROTOCOL_VERSION:
                raise self._lost("did not accept the stream: it speaks another protocol")
            self._request_credit = first.accept.request_credit_bytes
            self._owed_credit = 0
            for item in self._unanswered.values():
                item.is_queued, item.is_sent = True, False
            self._unsent = sorted((item.place, request_id) for request_id, item in self._unanswered.items())
            sender = asyncio.create_task(self._send(call))
            while (message := await self._read(call)) is not grpc.aio.EOF:
                self._messages += 1
                self._take(message)
        finally:
            call.cancel()
            if sender is not None:
                sender.cancel()
                await asyncio.gather(sender, return_exceptions=True)  # where writing failed, reading says why

    async def _send(self, call: Any) -> None:
        """All writes of one stream: credits first, then items as the teacher's credit allows."""
        while True:
            await self._until(lambda: self._grantable() > 0 or (bool(self._unsent) and self._request_credit > 0))
            if grant := self._grantable():
                self._owed_credit = 0
                await call.write(pb.ScoreRequest(credit=pb.Credit(bytes=grant)))
                continue
            _, request_id = heapq.heappop(self._unsent)
            item = self._unanswered.get(request_id)
            if item is None:
                continue
            request = encode_item(request_id, item.rollout, self._want, item.assembler.position)
            self._request_credit -= len(request.item.token_ids.data) + len(request.item.candidate_ids.data)
            item.is_queued, item.is_sent = False, True
            await call.write(request)

    def _grantable(self) -> int:
        """Bytes to grant now: in larger steps, and none while the caller leaves a window's worth of answers untaken."""
        return self._owed_credit if self._owed_credit >= _WINDOW // 8 and self._ready_bytes < _WINDOW else 0

    async def _read(self, call: Any) -> Any:
        """The next message. Raises `TeacherError` where answers are due and none comes for the time allowed."""
        reading = asyncio.ensure_future(call.read())
        patience = min(1.0, self._timeout / 4)
        try:
            while not (await asyncio.wait({reading}, timeout=patience))[0]:
                is_due = bool(self._unanswered) and self._ready_bytes < _WINDOW  # else it waits for us
                self._silence = self._silence + patience if is_due else 0.0
                if self._silence >= self._timeout:
                    raise self._lost(f"has not answered for {self._timeout:g} s (teacher.timeout)")
        finally:
            if not reading.done():
                reading.cancel()
                await asyncio.gather(reading, return_exceptions=True)
        self._silence = 0.0
        return reading.result()

    # ------------------------------------------------------------ answers

    def _take(self, message: pb.ScoreResponse) -> None:
        kind = message.WhichOneof("kind")
        if kind == "credit":
            self._request_credit += message.credit.bytes
        elif kind == "failure":
            self._take_failure(message.failure)
        elif kind == "chunk":
            self._take_chunk(message.chunk)
        else:
            raise self._lost(f"sent {kind or 'nothing'} in the middle of a stream")
        self._notify()

    def _take_chunk(self, chunk: pb.SignalChunk) -> None:
        payload = payload_bytes(chunk)
        self._owed_credit += payload
        item = self._item(chunk.request_id)
        if item is None:
            return
        try:
            item.assembler.add(chunk)
        except BadAnswerError as error:
            self._counters["bad_answers"] += 1
            self._retry(chunk.request_id, error, 0.0)
            return
        if item.assembler.is_complete:
            self._retire(chunk.request_id)
            signal = item.assembler.signal()
            size = sum(array.nbytes for array in (signal.logits, signal.ids, signal.logprobs) if array is not None)
            self._ready_bytes += size
            self._scored += 1
            self._ready.put_nowait(_Ready(ScoredRollout(item.rollout, signal), size))
            self._end_if_done()

    def _take_failure(self, message: pb.ItemFailure) -> None:
        if self._item(message.request_id) is None:
            return
        error = decode_failure(message)
        if not error.is_retryable:
            raise self._lost(f"refused an item ({error.code}): {error}")
        self._retry(message.request_id, error, min(error.retry_after, self._timeout / 2))

    def _item(self, request_id: int) -> _Item | None:
        """The unanswered item of this number; None for what still comes of an answer given up."""
        if not 0 < request_id < self._next_id:
            raise self._lost(f"answered request {request_id}, which was never made")
        return self._unanswered.get(request_id)

    def _retry(self, request_id: int, error: TeacherError, delay: float) -> None:
        """Ask again, under a new number: chunks of the old answer may still be on their way."""
        item = self._unanswered[request_id]
        if item.retries >= _RETRIES:
            raise self._lost(f"failed the same item {_RETRIES + 1} times, at last: {error}")
        self._counters["retries"] += 1
        del self._unanswered[request_id]
        again = self._ask(item.place, item.rollout, item.retries + 1)
        if delay:
            asyncio.get_running_loop().call_later(delay, self._queue, again)
        else:
            self._queue(again)

    def _retire(self, request_id: int) -> None:
        self._tokens -= len(self._unanswered.pop(request_id).rollout.all_ids)

    # ------------------------------------------------------------ waiting and ending

    async def _until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            self._changed.clear()
            await self._changed.wait()

    def _notify(self) -> None:
        self._changed.set()

    async def _guard(self, work: Awaitable[None]) -> None:
        """Run one of the tasks; what it raises goes to whoever waits for answers."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._ready.put_nowait(_End(error))

    def _lost(self, what: str) -> TeacherError:
        waiting = [item.rollout.rollout_id for item in self._unanswered.values()]
        shown = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > 5 else "")
        return TeacherError(f"teacher at {self._target} {what}; {self._scored} rollouts were scored, unanswered: {shown or 'none'}")
