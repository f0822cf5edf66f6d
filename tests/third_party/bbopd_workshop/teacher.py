"""A Hugging Face model as a teacher within the run's own process."""

from __future__ import annotations

from collections.abc import AsyncIterator

from pydantic import BaseModel, ConfigDict

from bbopd.modeling import load_model, load_tokenizer
from bbopd.pipeline.plugged import TeacherSetting
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo


class InProcess:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

        model: str

    info: TeacherInfo

    def __init__(self, setting: TeacherSetting, options: Options) -> None:
        self._folder = options.model

    async def start(self) -> None:
        model, tokenizer = load_model(self._folder), load_tokenizer(self._folder)
        self._teacher = LocalTeacher(HFBackend(model, tokenizer, levels=("full", "text"), name=self._folder))
        self.info = self._teacher.info

    def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        return self._teacher.score(rollouts, want)

    def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        return self._teacher.complete(prompts, sampling)

    async def close(self) -> None:
        await self._teacher.close()
