"""``python -m benchmarks.harness_parity MODEL``: a multiple-choice task by bbopd and by lm-evaluation-harness itself, on the same items.

The items of a task file of ``bbopd eval`` are written down as a task of the harness, which asks them of the same model by its own
transformers class, in the same dtype. The table says what each comes to, on how many items both choose the same, and how long each took.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from bbopd.errors import ConfigError
from bbopd.evaluate.results import run_task
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.load import task_from_file
from bbopd.evaluate.tasks.multiple_choice import MultipleChoice
from bbopd.modeling import compute_dtype, load_model, load_tokenizer, resolve_device, used_vocabulary
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.progress import Silent
from bbopd.pipeline.student import end_of_answer_ids
from bbopd.rollouts.hf import HFEngine
from benchmarks.machine import describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

METRICS = ("acc", "acc_norm", "acc_bytes")

Items = Mapping[str, Mapping[str, float]]
"""By metric and item, whether the choice was right."""


def as_harness_task(task: MultipleChoice, folder: Path) -> Path:
    """``task`` as one of the harness, in ``folder``, with its items as bbopd asks them."""
    rows = [{"prompt": item.prompt, "choices": item.choices, "right": item.right} for item in task.items]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    written = folder / "harness.yaml"
    settings = {
        "task": "same_items",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "right",
        "target_delimiter": task.delimiter,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in METRICS],
    }
    written.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    return written


def read_task(path: Path, limit: int | None) -> MultipleChoice:
    """Raises `ConfigError` for a task of another kind."""
    task = task_from_file(path, limit)
    if not isinstance(task, MultipleChoice):
        raise ConfigError(f"task {path} is of kind {task.info.kind}: this compares multiple choice")
    return task


def by_bbopd(task: MultipleChoice, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Items:
    vocab_size = used_vocabulary(tokenizer, model.get_output_embeddings().weight.shape[0])
    end_ids = end_of_answer_ids(model, tokenizer)
    writer = HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size)
    subject = Subject("model", model, tokenizer, engine=writer, vocab_size=vocab_size)

    async def ask() -> Items:
        async with AsyncExitStack() as stack:
            services = Services(RunFolder(Path()), stack, Silent())
            row = await run_task(task, subject, services, with_latency=False)
        return {metric: _in_order(row.measured.scores[metric].table[:, 0].tolist()) for metric in METRICS}

    return asyncio.run(ask())


def by_harness(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Items:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from lm_eval.evaluator import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

        found: Any = simple_evaluate(
            HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size),
            tasks=[str(path)],
            task_manager=TaskManager(include_defaults=False),
            bootstrap_iters=0,
        )
    (samples,) = found["samples"].values()
    ordered = sorted(samples, key=lambda sample: int(sample["doc_id"]))
    return {metric: _in_order([float(sample[metric]) for sample in ordered]) for metric in METRICS}


def _in_order(values: list[float]) -> dict[str, float]:
    return {str(place): value for place, value in enumerate(values)}


def table(ours: Items, theirs: Items, seconds: tuple[float, float]) -> str:
    lines = ["| metric | items | bbopd | lm_eval | items on which both are right or both wrong |", "|---|---|---|---|---|"]
    for metric in METRICS:
        own, other = ours[metric], theirs[metric]
        same = sum(own[item] == other[item] for item in own)
        means = (sum(values.values()) / len(values) for values in (own, other))
        lines.append(f"| {metric} | {len(own)} | " + " | ".join(f"{mean:.4f}" for mean in means) + f" | {same} |")
    return "\n".join([*lines, f"| seconds | | {seconds[0]:.0f} | {seconds[1]:.0f} | |"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.harness_parity", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", help="hub id, folder or GGUF file")
    parser.add_argument("--task", type=Path, default=Path("examples/tasks/mmlu.yaml"), help="default examples/tasks/mmlu.yaml")
    parser.add_argument("--limit", type=int, help="the first items alone")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--batch-size", type=int, default=8, help="of the harness (default 8)")
    parser.add_argument("--output", type=Path, metavar="FILE.JSON", help="keep every item's result")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.model)
    model = load_model(args.model, dtype=compute_dtype(args.dtype, resolve_device("auto")))
    with tempfile.TemporaryDirectory() as scratch:
        task = read_task(args.task, args.limit)
        path = as_harness_task(task, Path(scratch))
        start = time.monotonic()
        ours = by_bbopd(task, model, tokenizer)
        middle = time.monotonic()
        theirs = by_harness(path, model, tokenizer, args.batch_size)
        seconds = (middle - start, time.monotonic() - middle)
    machine = describe(module="benchmarks.harness_parity")
    print(table(ours, theirs, seconds))
    print(f"\n{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, {machine['date']}: {machine['command']}")
    if args.output is not None:
        args.output.write_text(json.dumps({"machine": machine, "seconds": seconds, "bbopd": ours, "lm_eval": theirs}) + "\n")


if __name__ == "__main__":
    main()
