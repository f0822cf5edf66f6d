"""Many small jobs of many clients, put together into few large calls of one model.

A batch takes jobs of one kind (same `SignalSpec`, or same `Sampling`) up to a number of tokens. The client for whom the model has done
the least so far comes first (the virtual token counter of Sheng et al., *Fairness in Serving Large Language Models*, OSDI 2024), within
a client its calls in turn, within a call the order of its queue: so what a lone client sends in one burst is always cut into the same
batches, and one with ten thousand rollouts does not keep one with three waiting. The model runs in one thread of its own, so that the
event loop goes on moving bytes meanwhile.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.clients import Client
from bbopd.rpc.jobs import Answer, Job, answer_jobs, internal_error, job_name
from bbopd.rpc.observe import Observer
from bbopd.types import Completion

__all__ = ["Call", "Scheduler"]

_POLL = 0.01  # seconds
_QUIET_POLLS = 3  # without a new job, after which a burst counts as over: half-filled batches waste the model
_MOST_POLLS = 100  # of one burst; counted, not timed: a machine that pauses meanwhile cuts no burst short
_log = logging.getLogger("bbopd.serve")


@dataclass(eq=False, slots=True)
class Call:
    """What one open call waits for: jobs not yet taken, and bytes of answers (to be) made and not yet taken by it."""

    client: Client
    queue: deque[Job] = field(default_factory=deque)
    pending_bytes: int = 0
    is_open: bool = True


class Scheduler:
    """Batches jobs by token count and runs them, until closed.

    Parameters
    ----------
    batch_tokens : packed tokens of one batch, prompts included; a single longer job still runs, alone.
    max_inflight_bytes : answers of one client that may be waiting. One batch makes at most half of it for one call, and a call whose
        client has not taken enough for that half to fit is passed over, unless it has taken all of its own: a batch is put off,
        never cut smaller by how fast answers go, and no call waits for another one's answers to be taken for ever.
    observer : is told of every batch.
    clock : seconds, for what is measured.
    """

    def __init__(
        self,
        backend: TeacherBackend,
        *,
        batch_tokens: int,
        max_inflight_bytes: int,
        observer: Observer,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._batch_tokens = batch_tokens
        self._max_inflight_bytes = max_inflight_bytes
        self._observer = observer
        self._clock = clock
        self._clients: dict[Client, None] = {}  # those with calls, in the order in which they came
        self._service_floor = 0.0
        self._seconds_per_token = 1e-3  # of what was run so far
        self._submitted = 0
        self.queued_items = 0
        self.queued_tokens = 0
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bbopd-teacher")
        self._loop_task = asyncio.create_task(self._run())

    def open_call(self, client: Client) -> Call:
        call = Call(client)
        client.calls.append(call)
        self._clients[client] = None
        return call

    def close_call(self, call: Call) -> None:
        """Forget a call that has ended, with all it still waited for."""
        for job in call.queue:
            self._count(job, -1)
        call.queue.clear()
        call.client.pending_bytes -= call.pending_bytes
        call.pending_bytes, call.is_open = 0, False
        call.client.calls.remove(call)
        if not call.client.calls:
            del self._clients[call.client]

    def submit(self, call: Call, job: Job) -> None:
        job.submitted_at = self._clock()
        call.queue.append(job)
        self._count(job, 1)
        self._submitted += 1
        self._work.set()

    def release(self, call: Call, answer_bytes: int) -> None:
        """Note that an answer of this size has been taken."""
        if call.is_open:
            call.pending_bytes -= answer_bytes
            call.client.pending_bytes -= answer_bytes
            self._work.set()

    def _count(self, job: Job, sign: int) -> None:
        self.queued_items += sign
        self.queued_tokens += sign * job.tokens

    def seconds_for(self, tokens: int) -> float:
        """About how long the model needs for so much, by what it has done so far."""
        return tokens * self._seconds_per_token

    async def close(self) -> None:
        """Stop after the batch that is running, without waiting for it."""
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            await self._let_burst_arrive()
            batch = self._take_batch()
            if not batch:
                self._work.clear()
                continue
            jobs, started = [job for _, job in batch], self._clock()
            answers = await self._ask_model(jobs, is_shared=any(call is not batch[0][0] for call, _ in batch))
            seconds = self._clock() - started
            self._seconds_per_token += 0.2 * (seconds / sum(job.cost for job in jobs) - self._seconds_per_token)
            self._observer.batch_done(jobs, seconds, [started - job.submitted_at for job in jobs])
            for (call, job), answer in zip(batch, answers, strict=True):
                if isinstance(answer, Completion):
                    call.client.service -= job.cost - job.cost_of_writing(len(answer.token_ids))
                self._deliver(job, answer)

    async def _ask_model(self, jobs: list[Job], is_shared: bool) -> list[Answer]:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, answer_jobs, self._backend, jobs, is_shared)
        except Exception as error:
            _log.exception("a batch of %d items was lost", len(jobs))
            return [internal_error(job, error) for job in jobs]

    def _deliver(self, job: Job, answer: Answer) -> None:
        """Hand an answer over; one that cannot be is refused instead, and whatever happens the next one gets its turn."""
        try:
            job.deliver(answer)
        except Exception as error:
            _log.exception("the answer to %s could not be handed over", job_name(job))
            try:
                job.deliver(internal_error(job, error))
            except Exception:
                _log.exception("%s stays without an answer", job_name(job))

    async def _let_burst_arrive(self) -> None:
        """Wait until nothing more can join the next batch, or jobs have stopped coming."""
        submitted, quiet_polls = self._submitted, 0
        for _ in range(_MOST_POLLS):
            if quiet_polls == _QUIET_POLLS or not self._can_grow():
                return
            await asyncio.sleep(_POLL)
            quiet_polls = quiet_polls + 1 if self._submitted == submitted else 0
            submitted = self._submitted

    def _can_grow(self) -> bool:
        batch, is_closed = self._plan()
        return bool(batch) and not is_closed

    def _take_batch(self) -> list[tuple[Call, Job]]:
        """Take the next batch's jobs out of their queues and charge for them. Of a client's calls, the one served first goes last."""
        waiting = [client for client in self._clients if any(map(self._has_room_for_answers, client.calls))]
        for client in waiting:
            client.service = max(client.service, self._service_floor)  # who had nothing to do has saved nothing up
        self._service_floor = max(self._service_floor, min((client.service for client in waiting), default=0.0))
        batch, _ = self._plan()
        rotated: set[Client] = set()
        for call, job in batch:
            client = call.client
            call.queue.popleft()
            self._count(job, -1)
            call.pending_bytes += job.answer_bytes
            client.pending_bytes += job.answer_bytes
            client.service += job.cost
            if client not in rotated:
                rotated.add(client)
                client.calls.remove(call)
                client.calls.append(call)
        return batch

    def _plan(self) -> tuple[list[tuple[Call, Job]], bool]:
        """The next batch, and whether it is closed: full, or some call's next job had no place.

        A job that has no place, being of another kind or too large, holds back those behind it: were they to overtake it, a batch
        would depend on what had arrived when it was made.
        """
        batch: list[tuple[Call, Job]] = []
        room, is_closed = self._batch_tokens, False
        answer_bytes: Counter[Call] = Counter()
        turns = []
        for place, client in enumerate(self._clients):
            calls = deque((call, iter(call.queue)) for call in client.calls if self._has_room_for_answers(call))
            turns.append((max(client.service, self._service_floor), place, calls))
        heapq.heapify(turns)
        while turns and room > 0:
            service, place, calls = heapq.heappop(turns)
            if not calls:
                continue
            call, jobs = calls.popleft()
            job = next(jobs, None)
            if job is not None:
                answer_bytes[call] += job.answer_bytes
                fits = not batch or (job.kind == batch[0][1].kind and job.tokens <= room)
                if fits and not job.answer_bytes < answer_bytes[call] > self._max_inflight_bytes // 2:
                    batch.append((call, job))
                    room -= job.tokens
                    service += job.cost
                    calls.append((call, jobs))
                else:
                    is_closed = True
            heapq.heappush(turns, (service, place, calls))
        return batch, is_closed or room <= 0

    def _has_room_for_answers(self, call: Call) -> bool:
        """Whether the most that one batch can make for this call fits among the answers that its client has not taken."""
        if not call.queue:
            return False
        most = max(self._max_inflight_bytes // 2, call.queue[0].answer_bytes)
        return not call.pending_bytes or call.client.pending_bytes + most <= self._max_inflight_bytes
