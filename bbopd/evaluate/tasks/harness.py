"""Tasks of lm-evaluation-harness, by their names there or by their YAML files, asked through bbopd's own engines."""

from __future__ import annotations

import asyncio
import difflib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from bbopd.errors import BbopdError, ConfigError, DataError
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Measured, TaskInfo
from bbopd.extras import need

_SLOW_DRAWS = 100  # resamples of a metric that the harness adds up from all answers anew
_MARKS = re.compile(r"^(dataset_path|doc_to_text|output_type|group|include|custom_dataset)\s*:", re.MULTILINE)  # keys of its files alone


@dataclass(frozen=True, slots=True)
class TaskOptions:
    """``limit``: the first items of every task. Of the harness's alone, ``fewshot``: solved examples before each question (None: as the
    task says); ``chat``: ask through the chat template; ``path``: a folder with task files of one's own, known by their names."""

    limit: int | None = None
    fewshot: int | None = None
    chat: bool = False
    path: Path | None = None


def is_harness_file(path: Path) -> bool:
    """Whether a YAML file, which may hold tags of the harness's own, is a task of the harness and not one of bbopd's."""
    try:
        return _MARKS.search(path.read_text(encoding="utf-8")) is not None
    except OSError as error:
        raise ConfigError(f"cannot read task {path}: {error.strerror or error}") from error


class HarnessTask:
    """A task of the harness. Of a group all items are pooled, each counting once; ``notes`` has its members apart."""

    def __init__(self, name: str, loaded: Mapping[str, Any], options: TaskOptions, version: str) -> None:
        self._loaded, self._options = loaded, options
        members: Mapping[str, Any] = loaded["tasks"]
        digest = hashlib.sha256()
        for task in members.values():
            digest.update(json.dumps(task.dump_config(), sort_keys=True, default=str).encode())
            for document in task.eval_docs:
                digest.update(json.dumps(document, sort_keys=True, default=str).encode())
        sizes = [len(task.eval_docs) if options.limit is None else min(options.limit, len(task.eval_docs)) for task in members.values()]
        self.info = TaskInfo(
            name=Path(name).stem if name.endswith((".yaml", ".yml")) else name,
            kind="lm_eval",
            source=f"lm_eval {version}: {name}",
            sha256=digest.hexdigest(),
            items=sum(sizes),
            settings={"fewshot": options.fewshot, "chat": options.chat, "limit": options.limit, "members": list(members)},
        )

    def check_room(self, subject: Subject) -> None:
        """The harness makes its requests while it asks: lengths are not known before."""

    async def measure(self, subject: Subject, services: Services) -> Measured:
        """Raises `DataError` for what the harness or the task cannot do with this model."""
        from bbopd.evaluate.harness_model import HarnessModel

        model = HarnessModel(subject, asyncio.get_running_loop())
        found = await asyncio.to_thread(self._evaluate, model)
        members = {name: _scores(self._loaded["tasks"][name], samples) for name, samples in found["samples"].items()}
        if len(members) == 1:
            return Measured(next(iter(members.values())))
        apart = {name: {metric: scores.estimate().value for metric, scores in metrics.items()} for name, metrics in members.items()}
        return Measured(_pooled(members), notes={"members": apart})

    def _evaluate(self, model: Any) -> Mapping[str, Any]:
        evaluator = need("lm_eval.evaluator", "--tasks", extra="eval")
        options = self._options
        tasks = [*self._loaded["tasks"].values()]
        try:
            with _quietly():
                found: Mapping[str, Any] = evaluator.simple_evaluate(
                    model,
                    tasks=tasks,
                    num_fewshot=options.fewshot,
                    limit=options.limit,
                    apply_chat_template=options.chat,
                    bootstrap_iters=0,
                    random_seed=None,
                    numpy_random_seed=None,
                    torch_random_seed=None,
                )
        except BbopdError:
            raise
        except Exception as error:  # tasks hold code of their own, which raises anything
            raise DataError(f"task {self.info.name} of lm_eval failed: {type(error).__name__}: {error}") from error
        return found


def load_harness_tasks(names: Sequence[str], options: TaskOptions) -> list[HarnessTask]:
    """Tasks, groups and tags by name, or files, with their data.

    Raises
    ------
    ConfigError
        The library is not installed, or a name is not known; the nearest are named.
    DataError
        A task's data cannot be had.
    """
    library = need("lm_eval.tasks", f"task {names[0]}", extra="eval")
    version = str(need("importlib.metadata", "--tasks").version("lm_eval"))
    path = None if options.path is None else str(options.path)
    named = {name for name in names if not Path(name).is_file()}
    with _quietly():
        manager = library.TaskManager(include_path=path, include_defaults=False)
        if named - set(manager.all_tasks):  # to list the harness's own takes seconds
            manager = library.TaskManager(include_path=path)
    for name in sorted(named - set(manager.all_tasks)):
        raise ConfigError(unknown_task(name, manager.all_tasks))
    return [HarnessTask(name, _load(manager, name), options, version) for name in names]


def unknown_task(name: str, known: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(nearest)}?" if nearest else f"lm_eval knows {len(known)} tasks, none of such a name"
    return f"task {name!r} is neither a file here nor a task of lm_eval: {hint}"


def _load(manager: Any, name: str) -> Mapping[str, Any]:
    try:
        with _quietly():
            loaded: Mapping[str, Any] = manager.load([name])
    except Exception as error:  # loaders of data sets raise anything
        reason = " ".join(str(error).split())[:300]
        raise DataError(
            f"task {name} of lm_eval cannot be loaded ({type(error).__name__}: {reason}): its data comes from the hub, where there is one; "
            "for local data give it a task file with dataset_path: json and dataset_kwargs: {data_files: ...}"
        ) from error
    return loaded


def _scores(task: Any, samples: Sequence[Mapping[str, Any]]) -> dict[str, Scores]:
    """Every metric of one task, by its name and, where there are several, the filter that read the answers."""
    aggregations: Mapping[str, Callable[[list[Any]], float]] = task.aggregation()
    higher: Mapping[str, bool] = task.higher_is_better()
    filters = dict.fromkeys(sample["filter"] for sample in samples)
    found = {}
    for name in filters:
        own = [sample for sample in samples if sample["filter"] == name]
        for metric in dict.fromkeys(metric for sample in own for metric in sample["metrics"]):
            told = [sample for sample in own if metric in sample]
            items, values = [str(sample["doc_id"]) for sample in told], [sample[metric] for sample in told]
            key = metric if len(filters) == 1 else f"{metric}@{name}"
            found[key] = _one(items, values, aggregations.get(metric, fmean), bool(higher.get(metric, True)))
    return found


def _one(items: Sequence[str], values: Sequence[Any], aggregate: Callable[[list[Any]], float], higher: bool) -> Scores:
    if all(isinstance(value, int | float | np.number) for value in values):
        scores = Scores.mean(items, [float(value) for value in values], higher_is_better=higher)
        if abs(scores.estimate().value - float(aggregate(list(values)))) < 1e-9:
            return scores
    places = np.arange(len(values), dtype=np.float64)[:, None]
    return Scores(tuple(items), places, partial(_again, values, aggregate), higher_is_better=higher, draws=_SLOW_DRAWS)


def _again(values: Sequence[Any], aggregate: Callable[[list[Any]], float], places: np.ndarray, weight: np.ndarray) -> float:
    """The harness's own aggregation over items as often as they count."""
    chosen = np.repeat(places[:, 0].astype(int), weight.astype(int))
    return float(aggregate([values[index] for index in chosen]))


def _pooled(members: Mapping[str, Mapping[str, Scores]]) -> dict[str, Scores]:
    """Means over the items of all members, of metrics that every one has as a mean."""
    first = next(iter(members.values()))
    pooled = {}
    for metric, example in first.items():
        parts = [metrics.get(metric) for metrics in members.values()]
        if all(part is not None and part.is_mean for part in parts):
            items = [f"{name}/{item}" for name, metrics in members.items() for item in metrics[metric].items]
            values = np.concatenate([metrics[metric].table[:, 0] for metrics in members.values()])
            pooled[metric] = Scores.mean(items, values.tolist(), higher_is_better=example.higher_is_better)
    return pooled


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep the harness's advice to itself; what matters is raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
