"""Results of tasks: what a model got, how fast, and how models differ on the same items, as JSON that says all that it depends on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from bbopd.evaluate.paired import CONFIDENCE, compare
from bbopd.evaluate.services import Services
from bbopd.evaluate.statistics import Estimate
from bbopd.evaluate.subject import Speed, Subject
from bbopd.evaluate.tasks.base import Measured, Task
from bbopd.modeling import tokenizer_sha256
from bbopd.modeling.fingerprint import weights_sha256
from bbopd.pipeline.folder import describe_machine, describe_source

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One model on one task."""

    model: str
    task: str
    measured: Measured
    estimates: Mapping[str, Estimate]  # of the metrics of ``measured``
    speed: Speed
    truncated: int

    def to_json(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "task": self.task,
            "metrics": {
                name: {**asdict(self.estimates[name]), "higher_is_better": scores.higher_is_better, "items": len(scores.items)}
                for name, scores in self.measured.scores.items()
            },
            **asdict(self.speed),
            "tokens_per_second": self.speed.tokens_per_second,
            "truncated_requests": self.truncated,
            **self.measured.notes,
        }


async def run_task(task: Task, subject: Subject, services: Services, *, with_latency: bool = True) -> Row:
    """Raises what the task raises."""
    subject.begin()
    measured = await task.measure(subject, services)
    truncated, speed = subject.truncated, await subject.finish(with_latency=with_latency)
    estimates = {name: scores.estimate() for name, scores in measured.scores.items()}
    return Row(subject.name, task.info.name, measured, estimates, speed, truncated)


def describe_subject(subject: Subject) -> dict[str, Any]:
    """The model itself, for results."""
    model = subject.model
    return {
        "name": subject.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "weights_sha256": weights_sha256(model),
        "tokenizer_sha256": tokenizer_sha256(subject.tokenizer),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "vocab_size": subject.vocab_size,
        "positions": subject.positions,
    }


def comparisons(earlier: Iterable[Row], row: Row) -> list[dict[str, Any]]:
    """``row`` with those of earlier models on its task, on every metric that both have item by item."""
    found = []
    for first in earlier:
        if first.task != row.task:
            continue
        for name, scores in first.measured.scores.items():
            other = row.measured.scores.get(name)
            if other is not None and scores.is_comparable and set(scores.items) & set(other.items):
                compared = compare((first.model, scores), (row.model, other))
                found.append({"task": row.task, "metric": name, **compared.to_json()})
    return found


def document(command: str, tasks: Sequence[Task], models: Sequence[Line], rows: Sequence[Row], compared: Sequence[Line]) -> dict[str, Any]:
    """All of it, ready for JSON; ``models`` are of `describe_subject`, ``compared`` of `comparisons`."""
    return {
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "source": describe_source(),
        "confidence": CONFIDENCE,
        "tasks": [asdict(task.info) for task in tasks],
        "models": list(models),
        "rows": [row.to_json() for row in rows],
        "comparisons": list(compared),
    }
