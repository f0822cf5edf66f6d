"""One pass of rollouts through the replicas of a teacher: who is asked what, what is asked again, and when it has been enough.

A task takes rollouts from the source as long as there is room; one task per replica keeps a `ScoreStream`. An item belongs to one
stream at a time: to the one that has the least to do, and after a failure to a replica that has not failed on it, where there is
one. Rows that have arrived stay, so that an item goes on at its next row wherever it goes on. Every wait ends: by an answer, or
by the time limit.
"""

from __future__ import annotations

import asyncio
import hashlib
from bisect import insort
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.answers import SignalAssembler
from bbopd.rpc.channel import MESSAGE_BYTES
from bbopd.rpc.limits import RefusedError, check_rollout, check_want
from bbopd.teachers.backoff import RetryBudget
from bbopd.teachers.endpoint import Endpoint
from bbopd.teachers.score_stream import Item, ScoreStream
from bbopd.types import Rollout, ScoredRollout, SignalSpec, TeacherInfo

__all__ = ["ScoreSession"]

_RETRIES = 3  # of one item that fails or is answered badly
_BREAKS = 5  # streams that may break on one item, in a row, before it counts as what breaks them
_WINDOW = 64 * 2**20  # bytes of answers in flight, and again of answers ready and not yet taken by the caller
_PACE = 0.9  # of the requests a second that a teacher allows: the rest is for what must be asked again
_REQUEST_OVERHEAD = 4096  # bytes of a request beside its ids, at most


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
    endpoints : replicas of one teacher.
    info : what can be asked of every one of them.
    timeout : seconds without a row of an answer, while some are due, before the teacher counts as gone.
    inflight_tokens : tokens (prompts included) sent to one replica and not yet answered; a single longer rollout still goes, alone.
    counters : ``retries``, ``bad_answers``, ``reconnects``, ``moved`` and ``asked_again`` are counted here.
    is_alive : where False, there is no sense in waiting for it any more.
    may_replay : whether a replica may give again the answer that it gave to the same question before.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        info: TeacherInfo,
        want: SignalSpec,
        *,
        timeout: float,
        inflight_tokens: int,
        counters: Counter[str],
        budget: RetryBudget,
        is_alive: Callable[[], bool] | None = None,
        may_replay: bool = True,
    ) -> None:
        check_want(want, info)
        self._may_replay = may_replay
        self.want = want
        self.counters = counters
        self._info = info
        self._timeout = timeout
        self._budget = budget
        self._is_alive = is_alive
        # with others to go to, a silent replica is left in time for them to answer in its place
        patience = timeout if len(endpoints) == 1 else timeout / 2
        window = _WINDOW // len(endpoints)
        self._streams = [
            ScoreStream(endpoint, self, window=window, patience=patience, inflight_tokens=inflight_tokens) for endpoint in endpoints
        ]
        self._unanswered: set[Item] = set()
        self._pending: list[Item] = []  # those that no stream has, in the order of the source
        self._last_id = 0
        self._tokens = 0  # taken from the source and not answered
        self._source_ended = False
        self._scored = 0
        self._ready: asyncio.Queue[_Ready | _End] = asyncio.Queue()
        self._ready_bytes = 0
        self._silence = 0.0  # seconds since the last row; a caller that blocks the event loop does not add to it
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []

    async def run(self, rollouts: AsyncIterator[Rollout]) -> AsyncGenerator[ScoredRollout, None]:
        """Answers as each is ready. Raises `TeacherError` naming what was finished; errors of the source pass through."""
        work: list[Awaitable[None]] = [self._feed(rollouts), self._watch(), *(stream.keep() for stream in self._streams)]
        tasks = [asyncio.create_task(self._guard(each)) for each in work]
        try:
            while True:
                ready = await self._ready.get()
                if isinstance(ready, _End):
                    if ready.error is not None:
                        raise ready.error
                    return
                self._ready_bytes -= ready.payload
                self.notify()
                yield ready.scored
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # ------------------------------------------------------------ from the source to a stream

    async def _feed(self, rollouts: AsyncIterator[Rollout]) -> None:
        place, next_at = 0, 0.0
        async for rollout in rollouts:
            check_rollout(rollout, self.want, self._info)
            _check_size(rollout)
            tokens = len(rollout.all_ids)
            await self.until(partial(self._has_room, tokens))
            next_at = await self._keep_pace(next_at)
            if not self._unanswered:
                self._silence = 0.0
            item = Item(place, rollout, self._assembler(rollout), tokens)
            place += 1
            self._tokens += tokens
            self._unanswered.add(item)
            self._pending.append(item)
            self._budget.note_request()
            self.notify()
        self._source_ended = True
        self._end_if_done()

    async def _keep_pace(self, next_at: float) -> float:
        """Wait as long as the teacher's limit of requests a second asks. Returns when the next one may be made."""
        rate = _PACE * self._info.max_requests_per_second * len(self._streams)
        if not rate:
            return 0.0
        now = asyncio.get_running_loop().time()
        await asyncio.sleep(next_at - now)
        return max(now, next_at) + 1.0 / rate

    def _has_room(self, tokens: int) -> bool:
        return self._tokens == 0 or self._tokens + tokens <= sum(stream.limit for stream in self._streams)

    def _assembler(self, rollout: Rollout) -> SignalAssembler:
        return SignalAssembler(rollout, self.want, self._info.vocab_size, f"rollout {rollout.rollout_id}")

    def _assign(self) -> None:
        """Give what waits to the streams that have room, in the order of the source, least loaded first."""
        ready = [stream for stream in self._streams if stream.is_ready]
        now = asyncio.get_running_loop().time()
        waiting: list[Item] = []
        for number, item in enumerate(self._pending):
            free = [stream for stream in ready if stream.has_room(item.tokens)]
            if not free:
                waiting.extend(self._pending[number:])
                break
            fresh = [stream for stream in free if stream.endpoint not in item.failed_at]
            if item.not_before > now or not (fresh or self._failed_everywhere(item)):
                waiting.append(item)
                continue
            min(fresh or free, key=lambda stream: stream.endpoint.inflight_tokens).give(item)
        self._pending = waiting

    def _failed_everywhere(self, item: Item) -> bool:
        return all(stream.endpoint in item.failed_at or stream.endpoint.faults for stream in self._streams)

    # ------------------------------------------------------------ what streams report

    def has_work(self) -> bool:
        return bool(self._unanswered)

    def is_waiting_for_caller(self) -> bool:
        """Whether the caller leaves a window's worth of answers untaken."""
        return self._ready_bytes >= _WINDOW

    def new_request_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def replay_id(self, item: Item) -> str:
        """A name for the question, so that what was lost on its way need not be made again; none after a bad answer.

        It is that of this rollout: the same text in a later cycle is asked anew. Else an answer would depend on what had been asked
        before, and a run that goes on would not repeat one that was never interrupted: with others in the batch the last bits differ.
        """
        if not self._may_replay or item.failures:
            return ""
        kind = f"{self.want.level} {self.want.temperature!r} {self.want.top_k} {self._info.weights_version} "
        return hashlib.sha256(kind.encode() + item.assembler.digest + item.rollout.rollout_id.encode()).hexdigest()

    def was_made(self, request_id: int) -> bool:
        return 0 < request_id <= self._last_id

    def take_rows(self) -> None:
        self._silence = 0.0

    def take_answer(self, item: Item) -> None:
        self._unanswered.remove(item)
        self._tokens -= item.tokens
        signal = item.assembler.signal()
        size = sum(array.nbytes for array in (signal.logits, signal.ids, signal.logprobs) if array is not None)
        self._ready_bytes += size
        self._scored += 1
        self._ready.put_nowait(_Ready(ScoredRollout(item.rollout, signal), size))
        self._end_if_done()

    def take_failure(self, endpoint: Endpoint, item: Item, error: TeacherError) -> None:
        """Ask again, elsewhere or later; raise where that is of no use."""
        retry_after = 0.0
        item.failed_at.add(endpoint)
        if isinstance(error, BadAnswerError):
            self.counters["bad_answers"] += 1
        elif isinstance(error, RefusedError):
            may_differ_elsewhere = error.code in ("bad_signal", "internal") and not self._failed_everywhere(item)
            if not (error.is_retryable or may_differ_elsewhere):
                raise self.lost(f"refused an item ({error.code}): {error}")
            retry_after = min(error.retry_after, self._timeout)
        is_busy = isinstance(error, RefusedError) and error.code in ("unavailable", "over_limit")
        item.failures += not is_busy
        item.failed_last = not is_busy
        if item.failures > _RETRIES:
            raise self.lost(f"failed the same item {item.failures} times, at last: {error}")
        self.counters["retries"] += 1
        endpoint.note_failure(str(error), retry_after)
        item.assembler = self._assembler(item.rollout)
        delay = self._budget.take_retry()
        item.not_before = asyncio.get_running_loop().time() + delay
        self._put_back(item)
        self._notify_in(delay)
        self._notify_in(endpoint.rest_seconds)

    def take_back(self, endpoint: Endpoint, items: list[Item]) -> None:
        """The items of a stream that broke: each goes on at its next row, on whichever stream has room first."""
        refused = [stream.endpoint for stream in self._streams if stream.endpoint.refusal]
        if len(refused) == len(self._streams):
            raise self.lost(f"refused the stream: {endpoint.refusal}")
        for item in items:
            if 0 <= item.sent_from == item.assembler.position:
                item.breaks += 1
            if item.breaks > _BREAKS:
                raise self.lost(f"broke the stream {item.breaks} times on rollout {item.rollout.rollout_id}, at last: {endpoint.trouble}")
            self._put_back(item)
        if len(self._streams) > 1:
            self.counters["moved"] += len(items)
        self.notify()

    def _put_back(self, item: Item) -> None:
        item.sent_from = -1
        insort(self._pending, item, key=lambda each: each.place)

    # ------------------------------------------------------------ waiting and ending

    async def _watch(self) -> None:
        """Give the session up when no row has come for the time allowed."""
        tick = min(1.0, self._timeout / 8)
        while True:
            await asyncio.sleep(tick)
            is_due = not self.is_waiting_for_caller() and not all(map(self._is_put_off, self._unanswered))
            self._silence = self._silence + tick if is_due else 0.0
            if is_due and self._is_alive is not None and not self._is_alive():
                raise self.lost("has ended")
            if self._silence >= self._timeout:
                raise self.lost(f"has not answered for {self._timeout:g} s (teacher.timeout)")
            self.notify()

    def _is_put_off(self, item: Item) -> bool:
        """Whether the client itself waits before it asks again, after a failure of which an item has a few and no more."""
        return item.failed_last and item.not_before > asyncio.get_running_loop().time()

    async def until(self, is_true: Callable[[], bool]) -> None:
        while not is_true():
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append((is_true, turn))
            await turn

    def notify(self) -> None:
        """Something has changed: items may be given, and whoever waits for what is true now goes on (waking the others costs more)."""
        if self._pending:
            self._assign()
        waiting, self._waiting = self._waiting, []
        for is_true, turn in waiting:
            if turn.done():  # given up
                continue
            if is_true():
                turn.set_result(None)
            else:
                self._waiting.append((is_true, turn))

    def _notify_in(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds + 0.001, self.notify)

    def _end_if_done(self) -> None:
        if self._source_ended and not self._unanswered:
            self._ready.put_nowait(_End(None))

    async def _guard(self, work: Awaitable[None]) -> None:
        """Run one of the tasks; what it raises goes to whoever waits for answers."""
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            self._ready.put_nowait(_End(error))

    def lost(self, what: str) -> TeacherError:
        """An error that says what became of the pass; the last trouble of every replica is part of it."""
        endpoints = [stream.endpoint for stream in self._streams]
        waiting = [item.rollout.rollout_id for item in sorted(self._unanswered, key=lambda item: item.place)]
        shown = ", ".join(waiting[:5]) + (f" and {len(waiting) - 5} more" if len(waiting) > 5 else "")
        shown += " (asked again in vain on an open stream)" if any(item.asked_again for item in self._unanswered) else ""
        troubles = [f"{endpoint.target}: {endpoint.refusal or endpoint.trouble}" for endpoint in endpoints if endpoint.faults]
        reasons = f" (last trouble: {'; '.join(troubles)})" if troubles else ""
        return TeacherError(
            f"teacher at {', '.join(endpoint.target for endpoint in endpoints)} {what}{reasons}; "
            f"{self._scored} rollouts were scored, unanswered: {shown or 'none'}"
        )


def _check_size(rollout: Rollout) -> None:
    """Whether a request fits one message. Raises `RefusedError` naming the rollout."""
    candidates = rollout.candidate_ids
    size = 4 * len(rollout.all_ids) + (4 * candidates.size if candidates is not None else 0)
    if size > MESSAGE_BYTES - _REQUEST_OVERHEAD:
        raise RefusedError(
            "too_long", f"rollout {rollout.rollout_id} takes {size} bytes, a request at most {MESSAGE_BYTES}: cut it, or ask for fewer ids"
        )
