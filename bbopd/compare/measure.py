"""One model on one file of questions, measured item by item, in a process of its own: ``python -m bbopd.compare.measure REQUEST``.

The request is a JSON object (`MeasureRequest`), and what follows `MARK` in the answer another one. An error of a person's making goes to
the error output, with its exit status.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbopd.config_compare import is_share
from bbopd.config_file import parse_config, read_yaml
from bbopd.config_task import TaskConfig
from bbopd.errors import BbopdError, DataError
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.progress import Silent

if TYPE_CHECKING:
    from bbopd.evaluate.exact_match import Answered
    from bbopd.evaluate.scores import Scores
    from bbopd.evaluate.services import Services
    from bbopd.evaluate.subject import Subject
    from bbopd.evaluate.tasks.base import Task
    from bbopd.types import Prompt

MARK = "measured: "
_SHOWN = 3  # answers kept to be looked at
_REPEATED = 3  # requests for the latency


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    model: str
    questions: str
    limit: int | None
    is_task: bool
    exact_match: bool
    pattern: str | None
    max_new_tokens: int
    device: str
    dtype: str
    also: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def settings(self) -> dict[str, Any]:
        """All but the model: what figures that are compared must have in common. Raises `BbopdError` for a file that cannot be read."""
        settings = {**self.to_json(), "sha256": _sha256(self.questions, is_task=self.is_task)}
        known = {name: value for name, value in settings.items() if name not in ("model", "questions", "device", "also")}
        return known | ({"also": [_sha256(name, is_task=True) for name in self.also]} if self.also else {})


def _sha256(questions: str, *, is_task: bool) -> str:
    """Over a file of questions, or over a task's file and its data."""
    files = [Path(questions)]
    if is_task and files[0].suffix in (".yaml", ".yml"):
        files.append(files[0].parent / parse_config(read_yaml(files[0]), (), TaskConfig, f"task {files[0]}").data)
    try:
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    except OSError as error:
        raise DataError(f"cannot read {error.filename}: {error.strerror or error}") from error


async def measure(request: MeasureRequest) -> dict[str, Any]:
    """What the file has what it takes for: every measure with its items, numerators and denominators; what that takes of the machine; and
    the metrics of further tasks, as ``task.metric``. Raises `BbopdError`."""
    from bbopd.evaluate.exact_match import read_answers
    from bbopd.evaluate.services import Services
    from bbopd.evaluate.subject import Subject
    from bbopd.evaluate.tasks.load import task_from_file
    from bbopd.modeling import compute_dtype, load_model, load_tokenizer, resolve_device, used_vocabulary
    from bbopd.pipeline.student import end_of_answer_ids
    from bbopd.rollouts.hf import HFEngine

    answers = read_answers(request.questions) if request.exact_match and not request.is_task else {}
    task = task_from_file(Path(request.questions), request.limit) if request.is_task else None
    others = [task_from_file(Path(name)) for name in request.also]
    tokenizer = load_tokenizer(request.model)
    model = load_model(request.model, device=request.device, dtype=compute_dtype(request.dtype, resolve_device(request.device)))
    end_ids = end_of_answer_ids(model, tokenizer)
    vocab_size = used_vocabulary(tokenizer, model.get_output_embeddings().weight.shape[0])
    engine = HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size)
    subject = Subject(request.model, model, tokenizer, engine=engine, vocab_size=vocab_size)
    start = time.monotonic()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="bbopd-compare-"))
        services = Services(RunFolder(Path(folder)), stack, Silent())
        subject.begin()
        measures, shown = await (_lines(request, subject, answers) if task is None else _task(task, subject, services))
        speed = await subject.finish(with_latency=True)
        for other in others:
            subject.begin()
            found, _ = await _task(other, subject, services)
            measures |= {f"{other.info.name}.{name}": items for name, items in found.items()}
    return {
        "settings": request.settings(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **speed.figures(),
        "measures": measures,
        "shown": shown,
        "seconds": round(time.monotonic() - start, 2),
    }


async def _lines(request: MeasureRequest, subject: Subject, answers: dict[str, str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Bits per byte of the responses that there are, and answers held to the right ones, a few of them to be looked at. The time is that of
    the answers, or else of the responses."""
    from bbopd.evaluate.bits_per_byte import score_text, token_byte_counts
    from bbopd.evaluate.exact_match import exact_match
    from bbopd.evaluate.student import StudentView

    prompts, tokenizer = _prompts(request, subject.tokenizer), subject.tokenizer
    measures: dict[str, Any] = {}

    async def score(asked: list[Prompt]) -> Scores:
        return score_text(StudentView(subject.model, vocab_size=subject.vocab_size), asked, token_byte_counts(tokenizer)).scores()

    async def answer(asked: list[Prompt]) -> list[Answered]:
        return await exact_match(
            subject.engine,
            asked,
            answers,
            pattern=request.pattern,
            max_new_tokens=request.max_new_tokens,
            decode=lambda ids: str(tokenizer.decode(list(ids), skip_special_tokens=True)),
        )

    if any(prompt.reference_ids for prompt in prompts):
        with subject.timed() as counts:
            scores = await score(prompts)
            counts.tokens += sum(len(prompt.token_ids) + len(prompt.reference_ids) for prompt in prompts)
        measures["bits_per_byte"] = _items(scores.items, scores.table[:, 0].tolist(), scores.table[:, 1].tolist())
    if not request.exact_match:
        subject.repeat([partial(score, [prompt]) for prompt in prompts[:_REPEATED]])
        return measures, []
    subject.begin()
    with subject.timed() as counts:
        answered = await answer(prompts)
        counts.tokens += sum(len(prompt.token_ids) for prompt in prompts) + sum(item.tokens for item in answered)
    subject.repeat([partial(answer, [prompt]) for prompt in prompts[:_REPEATED]])
    measures["exact_match"] = _items(
        [item.prompt_id for item in answered], [float(item.is_right) for item in answered], [1.0] * len(answered)
    )
    return measures, [asdict(item) for item in answered[:_SHOWN]]


async def _task(task: Task, subject: Subject, services: Services) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Metrics of a task that are a sum over a sum, item by item, and a few of its answers."""
    from bbopd.evaluate.scores import weighted_ratio

    found = await task.measure(subject, services)
    measures = {
        name: _items(scores.items, scores.table[:, 0].tolist(), scores.table[:, 1].tolist())
        for name, scores in found.scores.items()
        if scores.aggregate is weighted_ratio and scores.is_comparable and scores.higher_is_better == is_share(name)
    }
    return measures, list(found.notes.get("samples", ()))


def _prompts(request: MeasureRequest, tokenizer: Any) -> list[Any]:
    """The first ``limit`` questions, in the order of the file."""
    from bbopd.config import DataConfig, PromptSource
    from bbopd.data.prompts import load_prompts

    config = DataConfig(prompts=(PromptSource(jsonl=request.questions),), held_out=0.5)
    found = load_prompts(config, tokenizer, max_seq_len=2**31, eos_token_id=tokenizer.eos_token_id)
    ordered = sorted((*found.train, *found.held_out), key=lambda prompt: int(prompt.prompt_id.rpartition(":")[2]))
    return ordered[: request.limit]


def _items(names: Sequence[str], numerators: Sequence[float], denominators: Sequence[float]) -> dict[str, Any]:
    return {"items": list(names), "numerators": [round(value, 6) for value in numerators], "denominators": list(denominators)}


def main() -> int:
    given = json.loads(sys.argv[1])
    request = MeasureRequest(**{**given, "also": tuple(given["also"])})
    try:
        print(MARK + json.dumps(asyncio.run(measure(request))), flush=True)
    except BbopdError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
