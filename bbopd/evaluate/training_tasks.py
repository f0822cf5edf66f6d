"""The tasks of a run (``eval.tasks``), asked of the student at every evaluation."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Any

from bbopd.errors import ConfigError
from bbopd.evaluate.results import run_task
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Task
from bbopd.evaluate.tasks.judged import check_rivals
from bbopd.evaluate.tasks.load import load_tasks
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.session import Session


def load_run_tasks(names: tuple[str, ...], keep_best: str | None) -> list[Task]:
    """Read before a run spends anything. Raises as `load_tasks` does, and `ConfigError` for an ``eval.keep_best`` of another task."""
    tasks = load_tasks(names)
    check_rivals(tasks, ["student"])
    if keep_best is not None and "." in keep_best and keep_best.rpartition(".")[0] not in (task.info.name for task in tasks):
        raise ConfigError(f"eval.keep_best is {keep_best}, but the tasks are {', '.join(task.info.name for task in tasks)}")
    return tasks


class TrainingTasks:
    """Built once for a session; `measure` asks the student as it is then. ``stack`` closes judges and teachers of tasks."""

    def __init__(self, tasks: list[Task], session: Session, stack: AsyncExitStack, progress: Progress) -> None:
        self._tasks = tasks
        self._services = Services(session.folder, stack, progress)
        self._subject = Subject(
            "student",
            session.model,
            session.tokenizer,
            engine=session.parts.engine,
            vocab_size=session.vocab_size,
            compute_dtype=session.compute_dtype,
            engine_tokens=None if session.config.rollouts.engine == "hf" else session.config.train.max_seq_len,
        )

    async def measure(self, *, with_latency: bool) -> dict[str, Any]:
        """Figures for evals.jsonl, as ``task.metric``, with ``standard_errors`` of them, ``lower_is_better``, the names of those that
        are, and ``speeds`` by task; empty without tasks. Raises what the tasks raise."""
        if not self._tasks:
            return {}
        values: dict[str, Any] = {}
        errors: dict[str, float] = {}
        speeds: dict[str, dict[str, float | None]] = {}
        lower = []
        for task in self._tasks:
            row = await run_task(task, self._subject, self._services, with_latency=with_latency)
            speeds[task.info.name] = row.speed.figures()
            for metric, scores in row.measured.scores.items():
                name, estimate = f"{task.info.name}.{metric}", row.estimates[metric]
                values[name] = estimate.value
                if estimate.standard_error is not None:
                    errors[name] = estimate.standard_error
                if not scores.higher_is_better:
                    lower.append(name)
        return {**values, "standard_errors": errors, "lower_is_better": lower, "speeds": speeds}
