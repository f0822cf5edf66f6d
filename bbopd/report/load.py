"""The files of a run's folder as one object. Any of them may be missing: a run can be interrupted at any moment."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from bbopd.errors import DataError
from bbopd.pipeline.folder import RunFolder

Line = Mapping[str, Any]
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILES = ("metrics.jsonl", "evals.jsonl", "summary.json", "run.json")


@dataclass(frozen=True, slots=True)
class RunData:
    """What is known of a run: a line per optimizer step, a line per evaluation, how it began and how it ended."""

    name: str
    metrics: Sequence[Line]
    evals: Sequence[Line]
    summary: Line
    started: Line  # run.json: written at the start, so it is there for an interrupted run too
    trace: Line = field(default_factory=dict)  # trace.json, of the last session

    def about(self, key: str) -> Any:
        """``config``, ``machine``, ``command`` …: from the summary, or, where a run has none yet, from its start."""
        return self.summary.get(key) or self.started.get(key)

    @property
    def status(self) -> str:
        return str(self.summary.get("status", "interrupted"))

    @property
    def stages(self) -> tuple[Line, ...]:
        """The evaluations a reader compares: start, cold start and end; where there is no end, the last one there is."""
        named = {stage: line for line in self.evals if (stage := line.get("stage")) != "step"}
        chosen = [named[stage] for stage in ("start", "cold_start", "end") if stage in named]
        if self.evals and "end" not in named and self.evals[-1] not in chosen:
            chosen.append(self.evals[-1])
        return tuple(chosen)

    @property
    def trained_tokens(self) -> list[int]:
        """Response tokens trained after each line of ``metrics``, the labelled ones included."""
        return list(accumulate(int(line.get("tokens", 0)) for line in self.metrics))

    def tokens_at(self, step: int) -> int:
        """Response tokens trained when optimizer step ``step`` was done."""
        trained = zip(self.metrics, self.trained_tokens, strict=True)
        return max((tokens for line, tokens in trained if line.get("step", 0) <= step), default=0)


def load_run(run_dir: str | Path) -> RunData:
    """Read a run's folder. Raises `DataError` where it is not one."""
    root = Path(run_dir)
    folder = RunFolder(root)
    data = RunData(
        name=root.resolve().name,
        metrics=folder.read_lines("metrics.jsonl"),
        evals=folder.read_lines("evals.jsonl"),
        summary=folder.read_json("summary.json") or {},
        trace=folder.read_json("trace.json") or {},
        started=folder.read_json("run.json") or {},
    )
    if not (data.metrics or data.evals or data.summary or data.started):
        raise DataError(f"{root} holds no run: none of {', '.join(_FILES)} is there; give the folder of a run (its output=)")
    return data


def find_runs(paths: Sequence[str | Path]) -> list[Path]:
    """The folders of runs that are meant: each that is one, and of any other the runs that lie in it, by name.

    Raises `DataError` where there is neither.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        inside = [] if _is_run(path) or not path.is_dir() else [child for child in sorted(path.iterdir()) if _is_run(child)]
        if not inside:
            load_run(path)  # says what is missing
        found += inside or [path]
    return list(dict.fromkeys(found))


def load_runs(folders: Sequence[Path]) -> list[RunData]:
    """As `load_run`; runs of one name get that of the folder above theirs too."""
    names = Counter(folder.resolve().name for folder in folders)
    runs = []
    for folder in folders:
        data, whole = load_run(folder), folder.resolve()
        runs.append(replace(data, name=f"{whole.parent.name}/{whole.name}") if names[whole.name] > 1 else data)
    return runs


def is_on_hub(name: str) -> bool:
    """Whether ``name`` reads like a hub's id, and is no path of this machine."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def short_name(value: Any) -> Any:
    """``value``, or, of a path of this machine, its last name; addresses and a hub's ids stay whole."""
    if isinstance(value, str) and "/" in value and "://" not in value and not is_on_hub(value):
        return Path(value).name
    return value


def _is_run(path: Path) -> bool:
    return path.is_dir() and any((path / name).exists() for name in _FILES)
