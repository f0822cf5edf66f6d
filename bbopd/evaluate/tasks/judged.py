"""Answers compared by a judge, pair by pair and in both orders: with those of the task, or with the first model's."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import numpy as np

from bbopd.config_task import TaskConfig
from bbopd.errors import ConfigError
from bbopd.evaluate.length_control import length_controlled
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Measured, Room, TaskInfo
from bbopd.evaluate.tasks.generation import answers, subject_room
from bbopd.evaluate.tasks.rows import Row, Template, unique_clusters
from bbopd.evaluate.win_rate import QUESTION, Pair, judged

_DRAWS = 500  # regressions for an interval


class Judged:
    """``win_rate``: the mean verdict, ties counting half. ``win_rate_length_controlled``: what is left of it at equal length."""

    def __init__(self, info: TaskInfo, config: TaskConfig, rows: Sequence[Row]) -> None:
        assert config.prompt is not None, "a judged task has a prompt"
        self.info = info
        self._config = config
        self._names = [row.name for row in rows]
        self._clusters = unique_clusters(config.cluster, rows)
        prompt = Template(config.prompt, "prompt")
        self._prompts = [prompt.text(row) for row in rows]
        answer = None if config.answer is None else Template(config.answer, "answer")
        self._rivals = None if answer is None else [answer.text(row) for row in rows]
        self._rival = "the task's answers"

    @property
    def needs_baseline(self) -> bool:
        """Whether the first model's answers are what the others are compared with."""
        return self._config.answer is None

    def check_room(self, subject: Subject) -> Room:
        return subject_room(subject, self._prompts, self._config)

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `ModelError` where every answer is empty, and what the judge raises."""
        config = self._config.judge
        assert config is not None, "a judged task has a judge"
        judge = await services.judge(config, subject)
        written = await answers(subject, self._prompts, self._config, self.info.name)
        if self._rivals is None:
            self._rivals, self._rival = written, subject.name
            return Measured({}, notes={"is_baseline": True})
        pairs = [
            Pair(name, prompt, student=own, teacher=rival)
            for name, prompt, own, rival in zip(self._names, self._prompts, written, self._rivals, strict=True)
        ]
        wins = await judged(judge, pairs)
        places = [place for place, name in enumerate(self._names) if name in wins]
        items = [self._names[place] for place in places]
        clusters = tuple(self._clusters[place] for place in places) if self._clusters else ()
        longer = [len(written[place]) - len(self._rivals[place]) for place in places]
        table = np.column_stack([[wins[item] for item in items], longer]).astype(np.float64)
        return Measured(
            {
                "win_rate": Scores.mean(items, table[:, 0].tolist(), clusters=clusters),
                "win_rate_length_controlled": Scores(tuple(items), table, length_controlled, clusters, draws=_DRAWS),
            },
            notes={
                "against": self._rival,
                "judge": judge.info.model,
                "judge_prompt": QUESTION,
                "unread_pairs": len(self._names) - len(items),
                "characters": fmean(map(len, written)),
                "characters_of_rival": fmean(map(len, self._rivals)),
            },
        )


def check_rivals(tasks: Sequence[object], models: Sequence[str]) -> None:
    """Raises `ConfigError` for a judged task that has nothing to compare a single model with."""
    for task in tasks:
        if isinstance(task, Judged) and task.needs_baseline and len(models) < 2:
            raise ConfigError(
                f"task {task.info.name} compares answers, and there is one model and no answer: give the task an answer template, or a "
                "second model (the first is what the others are compared with)"
            )
