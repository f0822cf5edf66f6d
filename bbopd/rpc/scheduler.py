"""Many small jobs of many clients, put together into few large calls of one model.

A call takes jobs of one kind (same `SignalSpec`, or same `Sampling`) up to a number of tokens, from the clients in turn and from each
in the order of its queue, so that what a lone client sends in one burst is always cut into the same calls. The model runs in one
thread of its own, so that the event loop goes on moving bytes meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.signals import check_signal
from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherSignal

__all__ = ["Answer", "Client", "Job", "Scheduler"]

Answer = TeacherSignal | Completion | RefusedError

_POLL = 0.01  # seconds
_QUIET_POLLS = 3  # without a new job, after which a burst counts as over: half-filled calls waste the model
_LONGEST_LINGER = 1.0  # seconds
_log = logging.getLogger("bbopd.serve")


@dataclass(eq=False, slots=True)
class Job:
    """One rollout to score, or one prompt to answer; ``deliver`` is called with the outcome, on the event loop."""

    kind: SignalSpec | Sampling
    payload: Rollout | Prompt
    tokens: int
    answer_bytes: int
    deliver: Callable[[Answer], None]


@dataclass(eq=False, slots=True)
class Client:
    """What one caller waits for: jobs not yet taken, and bytes of answers (to be) made and not yet taken by it."""

    queue: deque[Job] = field(default_factory=deque)
    pending_bytes: int = 0


class Scheduler:
    """Batches jobs by token count and runs them, until closed.

    Parameters
    ----------
    batch_tokens : packed tokens of one call, prompts included; a single longer job still runs, alone.
    max_inflight_bytes : answers of one client that may be waiting. One call makes at most half of it for one client, and a client
        that has not taken enough for that half to fit is passed over: a call is put off, never cut smaller by how fast answers go.
    """

    def __init__(self, backend: TeacherBackend, *, batch_tokens: int, max_inflight_bytes: int) -> None:
        self._backend = backend
        self._batch_tokens = batch_tokens
        self._max_inflight_bytes = max_inflight_bytes
        self._clients: deque[Client] = deque()
        self._submitted = 0
        self._work = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bbopd-teacher")
        self._loop_task = asyncio.create_task(self._run())

    def add_client(self) -> Client:
        client = Client()
        self._clients.append(client)
        return client

    def drop_client(self, client: Client) -> None:
        """Forget a client that has gone, with all it still waited for."""
        client.queue.clear()
        self._clients.remove(client)

    def submit(self, client: Client, job: Job) -> None:
        client.queue.append(job)
        self._submitted += 1
        self._work.set()

    def release(self, client: Client, answer_bytes: int) -> None:
        """Note that a client has taken an answer of this size."""
        client.pending_bytes -= answer_bytes
        self._work.set()

    async def close(self) -> None:
        """Stop after the call that is running, without waiting for it."""
        self._loop_task.cancel()
        await asyncio.gather(self._loop_task, return_exceptions=True)
        self._thread.shutdown(wait=False, cancel_futures=True)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            await self._let_burst_arrive()
            batch = self._take_batch()
            if not batch:
                self._work.clear()
                continue
            jobs = [job for _, job in batch]
            try:
                answers = await loop.run_in_executor(self._thread, self._answer, jobs)
            except Exception as error:
                _log.exception("a batch of %d items was lost", len(jobs))
                answers = [_internal(job, error) for job in jobs]
            for (client, job), answer in zip(batch, answers, strict=True):
                if client in self._clients:
                    self._deliver(job, answer)

    def _deliver(self, job: Job, answer: Answer) -> None:
        """Hand an answer over; one that cannot be is refused instead, and whatever happens the next one gets its turn."""
        try:
            job.deliver(answer)
        except Exception as error:
            _log.exception("the answer to %s could not be handed over", _name(job))
            try:
                job.deliver(_internal(job, error))
            except Exception:
                _log.exception("%s stays without an answer", _name(job))

    async def _let_burst_arrive(self) -> None:
        """Wait until nothing more can join the next call, or jobs have stopped coming."""
        now = asyncio.get_running_loop().time
        deadline, submitted, quiet_polls = now() + _LONGEST_LINGER, self._submitted, 0
        while self._can_grow() and quiet_polls < _QUIET_POLLS and now() < deadline:
            await asyncio.sleep(_POLL)
            quiet_polls = quiet_polls + 1 if self._submitted == submitted else 0
            submitted = self._submitted

    def _can_grow(self) -> bool:
        batch, is_closed = self._plan()
        return bool(batch) and not is_closed

    def _take_batch(self) -> list[tuple[Client, Job]]:
        """Take the next call's jobs out of their queues. The client served first goes last next time."""
        batch, _ = self._plan()
        for client, job in batch:
            client.queue.popleft()
            client.pending_bytes += job.answer_bytes
        if batch:
            self._clients.remove(batch[0][0])
            self._clients.append(batch[0][0])
        return batch

    def _plan(self) -> tuple[list[tuple[Client, Job]], bool]:
        """The next call, one job from each client in turn, and whether it is closed: full, or some client's next job had no place.

        A job that has no place, being of another kind or too large, holds back those behind it: were they to overtake it, a call
        would depend on what had arrived when it was made.
        """
        batch: list[tuple[Client, Job]] = []
        room, is_closed = self._batch_tokens, False
        answer_bytes: Counter[Client] = Counter()
        turns = deque((client, iter(client.queue)) for client in self._clients if self._has_room_for_answers(client))
        while turns:
            client, jobs = turns.popleft()
            job = next(jobs, None)
            if job is None:
                continue
            answer_bytes[client] += job.answer_bytes
            fits = not batch or (job.kind == batch[0][1].kind and job.tokens <= room)
            if not fits or job.answer_bytes < answer_bytes[client] > self._max_inflight_bytes // 2:
                is_closed = True
                continue
            batch.append((client, job))
            room -= job.tokens
            turns.append((client, jobs))
        return batch, is_closed or room <= 0

    def _has_room_for_answers(self, client: Client) -> bool:
        """Whether the most that one call can make for this client fits among the answers it has not taken."""
        if not client.queue:
            return False
        most = max(self._max_inflight_bytes // 2, client.queue[0].answer_bytes)
        return not client.pending_bytes or client.pending_bytes + most <= self._max_inflight_bytes

    # ------------------------------------------------------------ in the model's thread

    def _answer(self, jobs: list[Job]) -> list[Answer]:
        """One outcome per job. Where a call fails, its jobs are run one by one, so that an item fails alone."""
        try:
            results = self._call(jobs)
            if len(results) != len(jobs):
                raise RuntimeError(f"the model gave {len(results)} answers to {len(jobs)} items")
            return [self._checked(job, result) for job, result in zip(jobs, results, strict=True)]
        except Exception as error:
            if len(jobs) > 1:
                _log.warning("a batch of %d items failed (%s); running them one by one", len(jobs), error)
                return [answer for job in jobs for answer in self._answer([job])]
            _log.warning("%s failed: %s", _name(jobs[0]), error, exc_info=True)
            return [_internal(jobs[0], error)]

    def _call(self, jobs: list[Job]) -> list[Any]:
        kind = jobs[0].kind
        payloads: list[Any] = [job.payload for job in jobs]
        if isinstance(kind, SignalSpec):
            return list(self._backend.score(payloads, kind))
        return list(self._backend.generate(payloads, kind))

    def _checked(self, job: Job, result: Any) -> Answer:
        if isinstance(job.kind, SignalSpec) and isinstance(job.payload, Rollout):
            try:
                check_signal(result, job.kind, np.array(job.payload.token_ids, np.int32), self._backend.info.vocab_size)
            except ValueError as error:
                _log.warning("%s: the model's answer %s", _name(job), error)
                return RefusedError("bad_signal", f"{_name(job)}: the model's answer {error}")
        return result


def _name(job: Job) -> str:
    return f"rollout {job.payload.rollout_id}" if isinstance(job.payload, Rollout) else f"prompt {job.payload.prompt_id}"


def _internal(job: Job, error: Exception) -> RefusedError:
    return RefusedError("internal", f"{_name(job)}: {type(error).__name__}: {error}", is_retryable=True)
