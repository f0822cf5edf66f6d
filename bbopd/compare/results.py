"""What is kept of every run: one small JSON file, from which the table can be made again long after the model is gone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bbopd.compare.plan import PlannedRun
from bbopd.config import RunConfig
from bbopd.errors import ConfigError
from bbopd.evaluate.crossed import Matrix, as_matrix
from bbopd.pipeline.folder import RunFolder, differences
from bbopd.report.load import load_run

_LENT = ("teacher.serve", None)  # of a run that was lent its teacher, beside what it would have started
_MAY_DIFFER = ("output", "teacher.target", "train.checkpoint_every", "train.keep_checkpoints")
_NOT_TRAINING = ("loading", "evaluation", "saving")
_FIGURES = ("bits_per_byte", "kl_held_out", "kl_rollouts", "reverse_kl_held_out", "reverse_kl_rollouts", "top1_held_out", "top1_rollouts")


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run has cost, its cold start included.

    ``seconds`` are those of sampling, scoring and training, ``all_seconds`` those of the whole process. ``teacher_sequences`` and
    ``teacher_tokens`` are what the teacher scored or wrote to be trained on; its part in evaluations is not counted.
    """

    student_tokens: int
    sampled_tokens: int
    updates: int
    seconds: float
    all_seconds: float
    teacher_sequences: int
    teacher_tokens: int


@dataclass(slots=True)
class Result:
    """``measured`` holds what `measure` found, by "development" and "test"; ``config`` and ``spent`` are None for a reference."""

    name: str
    entrant: str
    learning_rate: float | None = None
    seed: int | None = None
    config: dict[str, Any] | None = None
    spent: Spent | None = None
    figures: dict[str, float] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)

    def items(self, split: str, measure: str) -> Mapping[str, tuple[float, float]]:
        """(numerator, denominator) of every item."""
        found = self.measured[split]["measures"][measure]
        return dict(zip(found["items"], zip(found["numerators"], found["denominators"], strict=True), strict=True))

    def value(self, split: str, measure: str) -> float:
        pairs = self.items(split, measure).values()
        return sum(numerator for numerator, _ in pairs) / sum(denominator for _, denominator in pairs)


class ResultFolder:
    """``results/`` of a comparison, a file a run and a reference."""

    def __init__(self, root: Path) -> None:
        self._folder = RunFolder(root / "results")
        self.root = self._folder.root

    def read(self, name: str) -> Result | None:
        data = self._folder.read_json(f"{name}.json")
        if data is None:
            return None
        return Result(**{**data, "spent": None if data["spent"] is None else Spent(**data["spent"])})

    def write(self, result: Result) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._folder.write_json(f"{result.name}.json", asdict(result))

    def of_run(self, run: PlannedRun) -> Result | None:
        """What is known of a run that has ended. Raises `ConfigError` where it was run with another configuration."""
        result, planned = self.read(run.name), run.config.model_dump(mode="json")
        is_new = result is None
        if result is None:
            folder = RunFolder(Path(run.config.output))
            if not folder.is_finished:
                return None
            result = _collect(run)
        assert result.config is not None, "a run has one"
        before = RunConfig.model_validate(result.config).model_dump(mode="json")
        for key, then, now in differences(before, planned):
            if not key.startswith(_MAY_DIFFER) and (key, then) != _LENT:
                raise ConfigError(
                    f"{run.name} was run with {key} = {then!r} and is now planned with {now!r}: set output= to another folder, or remove "
                    f"{self.root / run.name}.json and {run.config.output} to run it again"
                )
        if is_new:
            result.config = planned  # which says whom a teacher that was lent is
        return result


def _collect(run: PlannedRun) -> Result:
    """The result of a run's folder. Raises `DataError` or `CheckpointError` where that cannot be read."""
    data = load_run(run.config.output)
    summary = data.summary
    seconds: Mapping[str, float] = summary["seconds"]
    last = data.stages[-1] if data.stages else {}
    asks_teacher = summary["tokens"]["scored"] > 0
    return Result(
        name=run.name,
        entrant=run.entrant,
        learning_rate=run.learning_rate,
        seed=run.seed,
        config=data.about("config"),
        spent=Spent(
            student_tokens=summary["tokens"]["trained"],
            sampled_tokens=summary["tokens"]["sampled"],
            updates=max((line["step"] for line in data.metrics), default=0),
            seconds=round(sum(value for name, value in seconds.items() if name not in _NOT_TRAINING), 2),
            all_seconds=round(sum(seconds.values()), 2),
            teacher_sequences=summary["sequences"]["trained"] if asks_teacher else 0,
            teacher_tokens=summary["tokens"]["scored"],
        ),
        figures={name: last[name] for name in _FIGURES if last.get(name) is not None},
        machine=data.about("machine"),
        source=data.about("source"),
    )


def matrices(results: list[Result], measure: str) -> tuple[list[str], Matrix, Matrix]:
    """Items that all of ``results`` were tested on, and their numerators and denominators [S, I]."""
    rows = [result.items("test", measure) for result in results]
    names = [name for name in rows[0] if all(name in row for row in rows)]
    numerators, denominators = ([[row[name][part] for name in names] for row in rows] for part in (0, 1))
    return names, as_matrix(numerators), as_matrix(denominators)


def reference_name(name: str) -> str:
    return "reference-" + re.sub(r"[^A-Za-z0-9_.-]+", "-", name)
