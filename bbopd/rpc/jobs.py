"""One unit of a model's work, and how a batch of them is answered so that an item fails alone."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.codec import packed_ids
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.rows import sent_rows
from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec, TeacherSignal

__all__ = ["Answer", "Job", "answer_jobs", "internal_error", "job_name"]

Answer = TeacherSignal | Completion | RefusedError

_WRITING = 10  # scored tokens that one written token costs: a 135M model on 2 cores scores 2,850 a second and writes 290
_log = logging.getLogger("bbopd.serve")


@dataclass(eq=False, slots=True)
class Job:
    """One rollout to score, or one prompt to answer; ``deliver`` is called with the outcome, on the event loop."""

    kind: SignalSpec | Sampling
    payload: Rollout | Prompt
    tokens: int
    """Prompt and answer, written or to be written."""
    answer_bytes: int
    deliver: Callable[[Answer], None]
    is_kept: bool = False
    """Whether the answer outlives its delivery."""
    submitted_at: float = 0.0

    @property
    def cost(self) -> int:
        """What it takes of the model, in scored tokens."""
        return self.cost_of_writing(self.kind.max_new_tokens) if isinstance(self.kind, Sampling) else self.tokens

    def cost_of_writing(self, written: int) -> int:
        """The same once it is known how much was written."""
        assert isinstance(self.kind, Sampling)
        return self.tokens - self.kind.max_new_tokens + _WRITING * written


def answer_jobs(backend: TeacherBackend, jobs: list[Job], is_shared: bool) -> list[Answer]:
    """One outcome per job. Where a batch fails, its jobs are run one by one.

    ``is_shared`` says that they belong to several calls: then no answer may hold the memory of another one's.
    """
    try:
        results = _call(backend, jobs)
        if len(results) != len(jobs):
            raise RuntimeError(f"the model gave {len(results)} answers to {len(jobs)} items")
        answers = [_checked(backend, job, result) for job, result in zip(jobs, results, strict=True)]
    except Exception as error:
        if len(jobs) > 1:
            _log.warning("a batch of %d items failed (%s); running them one by one", len(jobs), error)
            return [answer for job in jobs for answer in answer_jobs(backend, [job], is_shared)]
        _log.warning("%s failed: %s", job_name(jobs[0]), error, exc_info=True)
        return [internal_error(jobs[0], error)]
    return [
        _own_memory(answer) if (is_shared or job.is_kept) and isinstance(answer, TeacherSignal) else answer
        for job, answer in zip(jobs, answers, strict=True)
    ]


def job_name(job: Job) -> str:
    return f"rollout {job.payload.rollout_id}" if isinstance(job.payload, Rollout) else f"prompt {job.payload.prompt_id}"


def internal_error(job: Job, error: Exception) -> RefusedError:
    return RefusedError("internal", f"{job_name(job)}: {type(error).__name__}: {error}", is_retryable=True)


def _call(backend: TeacherBackend, jobs: list[Job]) -> list[Any]:
    kind = jobs[0].kind
    payloads: list[Any] = [job.payload for job in jobs]
    if isinstance(kind, SignalSpec):
        return list(backend.score(payloads, kind))
    return list(backend.generate(payloads, kind))


def _checked(backend: TeacherBackend, job: Job, result: Any) -> Answer:
    if isinstance(job.kind, SignalSpec) and isinstance(job.payload, Rollout):
        try:
            own = np.frombuffer(packed_ids(job.payload), "<i4")[len(job.payload.prompt.token_ids) :]
            return sent_rows(result, job.kind, own, backend.info.vocab_size)
        except ValueError as error:
            _log.warning("%s: the model's answer %s", job_name(job), error)
            return RefusedError("bad_signal", f"{job_name(job)}: the model's answer {error}")
    if not isinstance(result, Completion):
        raise TypeError(f"the model answered with {type(result).__name__}, not with a Completion")
    return result


def _own_memory(signal: TeacherSignal) -> TeacherSignal:
    """The same with arrays of its own: a view keeps the whole batch alive until the slowest client has taken its rows."""
    views = {name: getattr(signal, name) for name in ("logits", "ids", "logprobs", "log_tail", "sampled")}
    return dataclasses.replace(
        signal, **{name: array.copy() for name, array in views.items() if array is not None and not array.flags.owndata}
    )
