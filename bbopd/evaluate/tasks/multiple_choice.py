"""Multiple choice: the choice that the model finds likeliest after the prompt, as lm-evaluation-harness scores it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bbopd.config_task import TaskConfig
from bbopd.errors import DataError
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Measured, Room, TaskInfo
from bbopd.evaluate.tasks.rows import Row, Template, unique_clusters


@dataclass(frozen=True, slots=True)
class Item:
    """``right`` is the number of a choice."""

    prompt: str
    choices: tuple[str, ...]
    right: int


class MultipleChoice:
    """``acc`` takes the choice with the largest log-likelihood, ``acc_norm`` that with the largest per character of the choice,
    ``acc_bytes`` per byte of it. Raises `DataError` for a row that does not fit the task."""

    def __init__(self, info: TaskInfo, config: TaskConfig, rows: Sequence[Row]) -> None:
        assert config.prompt is not None, "a multiple choice has a prompt"
        assert config.choices is not None, "a multiple choice has choices"
        assert config.answer is not None, "a multiple choice has an answer"
        self.info = info
        self.delimiter = config.delimiter
        self._names = [row.name for row in rows]
        self._clusters = unique_clusters(config.cluster, rows)
        prompt, answer = Template(config.prompt, "prompt"), Template(config.answer, "answer")
        listed = Template(config.choices, "choices") if isinstance(config.choices, str) else None
        each = [] if isinstance(config.choices, str) else [Template(choice, "choices", is_text=True) for choice in config.choices]
        self.items: list[Item] = []
        for row in rows:
            choices = tuple(choice.text(row) for choice in each) if listed is None else tuple(listed.texts(row))
            if len(choices) < 2 or "" in choices:
                raise DataError(f"{row.where}: choices {list(choices)} must be two or more, and none of them empty")
            self.items.append(Item(prompt.text(row), choices, _right(answer.text(row), choices, row.where)))

    def check_room(self, subject: Subject) -> Room:
        """The longest choice of each item counts."""
        pairs = [[subject.pair(item.prompt, self.delimiter + choice) for choice in item.choices] for item in self.items]
        return Room.of((max(len(context) + len(choice) for context, choice in item) for item in pairs), subject.positions + 1)

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises what `Subject.likelihoods` raises."""
        pairs = [subject.pair(item.prompt, self.delimiter + choice) for item in self.items for choice in item.choices]
        found = iter(subject.likelihoods(pairs))
        right: dict[str, list[float]] = {"acc": [], "acc_norm": [], "acc_bytes": []}
        for item in self.items:
            nats = np.array([next(found).nats for _ in item.choices])
            for name, size in (("acc", None), ("acc_norm", len), ("acc_bytes", lambda choice: len(choice.encode()))):
                by = nats if size is None else nats / np.array([size(choice) for choice in item.choices])
                right[name].append(float(by.argmax() == item.right))
        return Measured({name: Scores.mean(self._names, values, clusters=self._clusters) for name, values in right.items()})


def _right(answer: str, choices: Sequence[str], where: str) -> int:
    """Which choice ``answer`` is: by its text, else by its number."""
    if choices.count(answer) == 1:
        return choices.index(answer)
    if answer.isdecimal() and int(answer) < len(choices):
        return int(answer)
    raise DataError(
        f"{where}: answer {answer[:100]!r} is none of the choices {list(choices)}, nor the number of one (from 0): mend the row, or give "
        "the task an answer template that makes it one"
    )
