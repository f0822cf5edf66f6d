"""From what was named on the command line or in a run's file to tasks: task files, plain JSONL, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bbopd.config_data import PromptSource
from bbopd.config_file import parse_config, read_yaml
from bbopd.config_task import Kind, TaskConfig
from bbopd.data.rows import jsonl_rows
from bbopd.data.sources import read_documents
from bbopd.errors import ConfigError, DataError
from bbopd.evaluate.tasks.agreement import TeacherAgreement
from bbopd.evaluate.tasks.base import Task, TaskInfo
from bbopd.evaluate.tasks.generation import Generation
from bbopd.evaluate.tasks.harness import TaskOptions, is_harness_file, load_harness_tasks
from bbopd.evaluate.tasks.judged import Judged
from bbopd.evaluate.tasks.multiple_choice import MultipleChoice
from bbopd.evaluate.tasks.rows import Row
from bbopd.evaluate.tasks.text import HeldOutText

_KINDS: Mapping[Kind, Callable[[TaskInfo, TaskConfig, Sequence[Row]], Task]] = {
    "multiple_choice": MultipleChoice,
    "generation": Generation,
    "text": HeldOutText,
    "judge": Judged,
    "agreement": TeacherAgreement,
}
_DEFAULTS = TaskOptions()
_PLAIN = (  # what a JSONL file without a task file is, by the fields of its first row
    ({"prompt", "choices", "answer"}, {"prompt": "prompt", "choices": "choices", "answer": "answer"}),
    ({"prompt", "answer"}, {"prompt": "prompt", "answer": "answer"}),
    ({"text"}, {"text": "text"}),
)


def load_tasks(names: Sequence[str], options: TaskOptions = _DEFAULTS) -> list[Task]:
    """Read every task, and its data, before anything is asked of a model.

    A name is the path of a task file (YAML: `TaskConfig`, or one of lm-evaluation-harness), of a JSONL file whose rows have ``prompt``,
    ``choices`` and ``answer``, or ``prompt`` and ``answer``, or ``text``, of a text file, or else a task or group of the harness.

    Raises
    ------
    ConfigError
        A task that is not known, or two of one name; a task file that cannot be read, or lacks a field.
    DataError
        Data that is empty or does not fit.
    """
    foreign = [name for name in names if _is_of_harness(name)]
    of_harness = dict(zip(foreign, load_harness_tasks(foreign, options), strict=True)) if foreign else {}
    tasks: list[Task] = [of_harness[name] if name in of_harness else task_from_file(Path(name), options.limit) for name in names]
    seen: dict[str, str] = {}
    for task in tasks:
        if task.info.name in seen:
            raise ConfigError(
                f"{seen[task.info.name]} and {task.info.source} are both task {task.info.name}: give one another name (task:)"
            )
        seen[task.info.name] = task.info.source
    return tasks


def _is_of_harness(name: str) -> bool:
    path = Path(name).expanduser()
    if path.suffix in (".yaml", ".yml"):
        return is_harness_file(path)
    return path.suffix not in (".jsonl", ".txt")


def task_from_file(path: Path, limit: int | None = None) -> Task:
    """A task file with its data, plain JSONL, or a text. Raises as `load_tasks` does."""
    path = path.expanduser()
    if path.suffix == ".jsonl":
        rows = _rows(path)
        return _task(path, _plain(path, rows), rows, path, limit)
    if path.suffix == ".txt":
        documents = [document for document in read_documents(PromptSource(text=str(path))) if document.text]
        if not documents:
            raise DataError(f"{path} holds no text")
        texts = [Row(document.name, document.where, {"text": document.text}) for document in documents]
        return _task(path, TaskConfig(data=path.name, text="text"), texts, path, limit)
    config = parse_config(read_yaml(path), [], TaskConfig, f"task {path}")
    data = path.parent / Path(config.data).expanduser()
    return _task(path, config, _rows(data), data, limit)


def _task(path: Path, config: TaskConfig, rows: Sequence[Row], data: Path, limit: int | None) -> Task:
    rows = rows[: min(limit or len(rows), config.limit or len(rows))]
    info = TaskInfo(
        name=config.task or path.stem,
        kind=config.kind,
        source=str(path),
        sha256=hashlib.sha256(b"".join(file.read_bytes() for file in dict.fromkeys((path, data)))).hexdigest(),
        items=len(rows),
        settings=config.model_dump(mode="json", exclude_defaults=True),
    )
    return _KINDS[config.kind](info, config, rows)


def _rows(path: Path) -> list[Row]:
    rows = []
    for name, where, fields in jsonl_rows(path):
        if not isinstance(fields, Mapping):
            raise DataError(f"{where}: a row is an object with named fields, not {type(fields).__name__}")
        rows.append(Row(name, where, fields))
    if not rows:
        raise DataError(f"{path} holds no row: a task needs at least one line of JSON")
    return rows


def _plain(path: Path, rows: Sequence[Row]) -> TaskConfig:
    fields = set(rows[0].fields)
    for needed, templates in _PLAIN:
        if needed <= fields:
            given: dict[str, Any] = {"data": path.name, **templates}
            return TaskConfig(**given)
    raise DataError(
        f"{rows[0].where}: a JSONL file is a task by itself where its rows have prompt, choices and answer, or prompt and answer, or text; "
        f"this row has {', '.join(sorted(fields)) or 'nothing'}: name its fields in a task file with data: {path.name}"
    )
