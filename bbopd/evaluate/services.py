"""Judges and teachers that tasks ask: opened when one is asked first, kept for the models that follow, closed together."""

from __future__ import annotations

from contextlib import AsyncExitStack

from bbopd.config import TeacherConfig
from bbopd.errors import ConfigError
from bbopd.evaluate.subject import Subject
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.progress import Progress
from bbopd.pipeline.teacher import open_judge, start_teacher
from bbopd.types import Teacher


class Services:
    """``stack`` closes what is opened; ``folder`` holds a judge's replies and the log of a teacher that is started."""

    def __init__(self, folder: RunFolder, stack: AsyncExitStack, progress: Progress) -> None:
        self._folder, self._stack, self._progress = folder, stack, progress
        self._open: dict[str, Teacher] = {}

    async def judge(self, config: TeacherConfig, subject: Subject) -> Teacher:
        """Raises `TeacherError` for one that cannot be reached or takes no messages."""
        key = config.model_dump_json()
        if key not in self._open:
            self._folder.root.mkdir(parents=True, exist_ok=True)
            self._open[key] = await open_judge(config, subject.tokenizer, subject.vocab_size, self._folder, self._stack, self._progress)
        return self._open[key]

    async def teacher(self, config: TeacherConfig) -> Teacher:
        """Raises `TeacherError` for one that cannot be reached or started, `ConfigError` for an API, which says too little of a token."""
        key = config.model_dump_json()
        if key not in self._open:
            self._folder.root.mkdir(parents=True, exist_ok=True)
            teacher, _ = await start_teacher(config, self._folder, self._stack, self._progress)
            if teacher is None:
                raise ConfigError(f"agreement with {config.target} cannot be measured: give a grpc:// target, or serve")
            self._open[key] = teacher
        return self._open[key]
