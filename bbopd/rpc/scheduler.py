"""Many small jobs of many clients, put together into few large calls of one model.

A call takes jobs of one kind (same `SignalSpec`, or same `Sampling`) up to a number of tokens, from the clients in turn. The
model runs in one thread of its own, so that the event loop goes on moving bytes meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
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

_LINGER = 0.01  # seconds without a new job after which a burst counts as over: half-filled calls waste the model
_LONGEST_LINGER = 0.2
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
    max_inflight_bytes : answers of one client that may be waiting; a client above it is passed over until it takes some.
    """

    def __init__(self, backend: TeacherBackend, *, batch_tokens: int, max_inflight_bytes: int) -> None:
        self._backend = backend
        self._batch_tokens = batch_tokens
        self._max_inflight_bytes = max_inflight_bytes
        self._clients: deque[Client] = deque()
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
            answers = await loop.run_in_executor(self._thread, self._answer, [job for _, job in batch])
            for (client, job), answer in zip(batch, answers, strict=True):
                if client in self._clients:
                    job.deliver(answer)

    async def _let_burst_arrive(self) -> None:
        """Wait until a call is full, or jobs have stopped coming: so the same burst always makes the same calls."""
        deadline = asyncio.get_running_loop().time() + _LONGEST_LINGER
        before = -1
        while before < (tokens := self._queued_tokens()) < self._batch_tokens and asyncio.get_running_loop().time() < deadline:
            before = tokens
            await asyncio.sleep(_LINGER)

    def _queued_tokens(self) -> int:
        return sum(job.tokens for client in self._clients for job in client.queue)

    def _take_batch(self) -> list[tuple[Client, Job]]:
        """One job from each client in turn, until nothing more fits. The client served first goes last next time."""
        batch: list[tuple[Client, Job]] = []
        tokens, progressed = 0, True
        while progressed:
            progressed = False
            for client in tuple(self._clients):
                job = self._next_fitting(client, batch[0][1].kind if batch else None, self._batch_tokens - tokens)
                if job is None:
                    continue
                client.queue.remove(job)
                client.pending_bytes += job.answer_bytes
                batch.append((client, job))
                tokens, progressed = tokens + job.tokens, True
        if batch:
            self._clients.remove(batch[0][0])
            self._clients.append(batch[0][0])
        return batch

    def _next_fitting(self, client: Client, kind: SignalSpec | Sampling | None, room: int) -> Job | None:
        """The client's oldest job of this kind that fits into the room (no kind: any), where its answer fits among those waiting."""
        job = next((job for job in client.queue if kind is None or (job.kind == kind and job.tokens <= room)), None)
        if job is None:
            return None
        if client.pending_bytes and client.pending_bytes + job.answer_bytes > self._max_inflight_bytes:
            return None
        return job

    # ------------------------------------------------------------ in the model's thread

    def _answer(self, jobs: list[Job]) -> list[Answer]:
        """One outcome per job. Where a call fails, its jobs are run one by one, so that an item fails alone."""
        try:
            results = self._call(jobs)
            if len(results) != len(jobs):
                raise RuntimeError(f"the model gave {len(results)} answers to {len(jobs)} items")
        except Exception as error:
            if len(jobs) > 1:
                _log.warning("a batch of %d items failed (%s); running them one by one", len(jobs), error)
                return [answer for job in jobs for answer in self._answer([job])]
            _log.warning("%s failed: %s", _name(jobs[0]), error, exc_info=True)
            return [RefusedError("internal", f"{_name(jobs[0])}: {type(error).__name__}: {error}", is_retryable=True)]
        return [self._checked(job, result) for job, result in zip(jobs, results, strict=True)]

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
