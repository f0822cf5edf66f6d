"""What models came to on tasks, and what asking them costs: from results of ``bbopd eval --tasks``, of a comparison, or of runs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bbopd.config_compare import is_share
from bbopd.errors import DataError
from bbopd.report.load import Line, RunData, short_name
from bbopd.report.table import split_key

COMPARISON = "compare.json"
_NORMAL_95 = 1.96  # standard errors to either side


@dataclass(frozen=True, slots=True)
class Score:
    """A metric of a model on a task, with its 95% interval where one is known."""

    value: float
    low: float | None = None
    high: float | None = None
    is_lower_better: bool = False


@dataclass(frozen=True, slots=True)
class Standing:
    """One model on one task: scores by metric; parameters, tokens a second, seconds of a request alone, bytes at the peak, where known."""

    model: str
    task: str
    scores: Mapping[str, Score]
    parameters: float | None = None
    tokens_per_second: float | None = None
    latency_seconds: float | None = None
    peak_memory_bytes: float | None = None
    more: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standings:
    """One file of results. ``sentences`` say which models differ; ``facts`` what is needed to repeat it."""

    name: str
    standings: Sequence[Standing]
    sentences: Sequence[str] = ()
    facts: Sequence[tuple[str, str]] = ()


def is_standings(path: Path) -> bool:
    """Whether ``path`` is meant as results of tasks: a JSON file, or the folder of a comparison."""
    return path.suffix == ".json" or (path / COMPARISON).exists()


def read_standings(path: Path) -> Standings:
    """Raises `DataError` for a file that cannot be read, or is neither."""
    file = path / COMPARISON if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}") from error
    keys = set(found) if isinstance(found, dict) else set()
    if {"rows", "models", "tasks"} <= keys:
        return _of_eval(path, found)
    if {"rows", "decide_by", "pairs"} <= keys:
        return _of_comparison(file.resolve().parent.name, found)
    raise DataError(
        f"{file} holds no results: give what `bbopd eval --tasks ... --output FILE.json` wrote, the folder of a comparison, or of a run"
    )


def of_runs(runs: Iterable[RunData]) -> list[Standing]:
    """The last evaluation of each run, by task; none of a run without tasks."""
    found = []
    for run in runs:
        line = run.stages[-1] if run.stages else {}
        errors, lower = line.get("standard_errors") or {}, line.get("lower_is_better") or ()
        by_task: dict[str, dict[str, Score]] = {}
        for key in (key for key in line if "." in key):
            task, metric = split_key(key)
            by_task.setdefault(task, {})[metric] = _score(line[key], errors.get(key), key in lower)
        speeds: Mapping[str, Line] = line.get("speeds") or {}
        found += [
            Standing(run.name, task, scores, parameters=run.summary.get("parameters"), **speeds.get(task, {}))
            for task, scores in by_task.items()
        ]
    return found


def _of_eval(path: Path, found: Mapping[str, Any]) -> Standings:
    parameters = {model["name"]: model["parameters"] for model in found["models"]}
    names = _short_names(parameters)
    standings = [
        Standing(
            names[row["model"]],
            row["task"],
            {
                metric: _score(cell["value"], cell["standard_error"], not cell["higher_is_better"])
                for metric, cell in row["metrics"].items()
            },
            parameters[row["model"]],
            row["tokens_per_second"],
            row["latency_seconds"],
            row["peak_memory_bytes"],
            {"items": "/".join(dict.fromkeys(str(cell["items"]) for cell in row["metrics"].values()))},
        )
        for row in found["rows"]
    ]
    sentences = [
        f"{line['task']}, {line['metric']}: {names[line['second']]} less {names[line['first']]} is {line['difference']:+.3g} "
        f"({found['confidence']:.0%} interval {line['low']:+.3g} to {line['high']:+.3g}, p = {line['p_value']:.2g})"
        + (": clear" if line["is_clear"] else "")
        for line in found["comparisons"]
    ]
    machine, source = found["machine"], found["source"]
    facts = [
        ("Command", " ".join(str(short_name(word)) for word in found["command"].split())),
        ("Date", found["date"]),
        ("Machine", f"{machine.get('cores', '?')} cores of {machine.get('processor') or 'an unknown processor'}"),
        ("Versions", ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())),
        ("Commit", f"{source['commit']} and {source.get('changed_files', 0)} changed files" if source.get("commit") else ""),
        *((f"SHA-256 of {task['name']}", task["sha256"]) for task in found["tasks"]),
        *((f"SHA-256 of {names[model['name']]}", model["weights_sha256"]) for model in found["models"]),
    ]
    return Standings(path.stem, standings, sentences, [(name, value) for name, value in facts if value])


def _of_comparison(name: str, found: Mapping[str, Any]) -> Standings:
    decides = found["decide_by"]
    standings = []
    for row in found["rows"]:
        ordered = sorted(row["tested"], key=lambda metric: (metric != decides, metric))
        scores = {
            metric: Score(tested["value"], tested["low"], tested["high"], not is_share(metric))
            for metric, tested in ((metric, row["tested"][metric]) for metric in ordered)
        }
        spent = row["spent"]
        more = {"seeds": "" if row["is_reference"] else str(len(row["seeds"]))}
        more["KL to the teacher"] = f"{row['figures']['kl_rollouts']:.3f}" if "kl_rollouts" in row["figures"] else ""
        more["tokens trained"] = f"{spent['student_tokens']:,.0f}" if spent else ""
        more["seconds"] = f"{spent['seconds']:,.0f}" if spent else ""
        standings.append(
            Standing(f"{row['name']} (reference)" if row["is_reference"] else row["name"], name, scores, **row.get("cost", {}), more=more)
        )
    facts = [
        ("Comparison", name),
        ("Decided by", decides),
        ("Confidence", f"{found['confidence']:.0%}, over seeds and questions"),
        *(("Missing", failure) for failure in found.get("failures", ())),
    ]
    return Standings(name, standings, [pair["verdict"] for pair in found["pairs"]], facts)


def _score(value: float, error: float | None, is_lower_better: bool) -> Score:
    if error is None:
        return Score(value, is_lower_better=is_lower_better)
    return Score(value, value - _NORMAL_95 * error, value + _NORMAL_95 * error, is_lower_better)


def _short_names(names: Iterable[str]) -> dict[str, str]:
    """The last part of each path, or, where two end alike, all of it."""
    short = {name: str(short_name(name)) for name in names}
    return {name: value if list(short.values()).count(value) == 1 else name for name, value in short.items()}
