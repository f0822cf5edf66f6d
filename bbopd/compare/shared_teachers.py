"""Teachers of a comparison: what its runs would each start for themselves (``teacher.serve``) is started once, and lent to all."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from bbopd.compare.plan import PlannedRun
from bbopd.compare.processes import FailedError
from bbopd.errors import TeacherError
from bbopd.teachers.process import TeacherProcess


class SharedTeachers:
    """One process for each different ``teacher.serve``, from the first run that needs it to the end of the ``with``; logs in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._running: dict[str, TeacherProcess] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self._running.values():
            process.stop()
        self._running.clear()

    def lend(self, run: PlannedRun) -> PlannedRun:
        """``run``, with the address of a running teacher where it would start one. Raises `FailedError` for one that does not start.

        Where the run needs the served model's own tokenizer, and names no other, it still starts its own.
        """
        serve, is_aligned = run.config.teacher.serve, run.config.objective.name == "aligned"
        if serve is None or (is_aligned and run.config.teacher.tokenizer is None):
            return run
        key = serve.model_dump_json()
        if key not in self._running or not self._running[key].alive:
            log = self._folder / f"teacher-{len(self._running)}.log"
            try:
                self._running[key] = asyncio.run(TeacherProcess.start(serve, log, run.config.teacher.start_timeout))
            except TeacherError as error:
                raise FailedError(f"run {run.name}: {error}") from error
        teacher = run.config.teacher.model_copy(update={"serve": None, "target": self._running[key].target})
        return replace(run, config=run.config.model_copy(update={"teacher": teacher}))
