"""``bbopd eval MODEL... --tasks ...``: models on tasks, one after another, and how they differ on the same items."""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from bbopd.cli.display import PlainDisplay
from bbopd.errors import CheckpointError, ConfigError
from bbopd.evaluate.result_tables import tables
from bbopd.evaluate.results import Row, comparisons, describe_subject, document, run_task
from bbopd.evaluate.services import Services
from bbopd.evaluate.subject import Subject
from bbopd.evaluate.tasks.base import Task
from bbopd.evaluate.tasks.harness import TaskOptions
from bbopd.evaluate.tasks.judged import check_rivals
from bbopd.evaluate.tasks.load import load_tasks
from bbopd.modeling import compute_dtype, load_model, load_tokenizer, max_positions, resolve_device, used_vocabulary
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.student import end_of_answer_ids
from bbopd.rollouts.hf import HFEngine

_VLLM_TOKENS = 4096  # of a prompt and its answer, where the model has no limit of its own


def run(args: argparse.Namespace) -> int:
    """Raises `BbopdError`; what was measured until then is in ``--output``."""
    if len(set(args.model)) < len(args.model):
        raise ConfigError(f"models {', '.join(args.model)}: each once, as a model does not differ from itself")
    output = None if args.output is None else Path(args.output).expanduser()
    if output is not None:
        _check_output(output)
    options = TaskOptions(args.limit, args.fewshot, args.chat, None if args.task_path is None else Path(args.task_path))
    tasks = load_tasks([name for given in args.tasks for name in given.split(",") if name], options)
    check_rivals(tasks, args.model)
    found = asyncio.run(_evaluate(args, tasks, output))
    if args.json:
        print(json.dumps(found))
    else:
        for table in tables(found):
            Console().print(table)
    return 0


async def _evaluate(args: argparse.Namespace, tasks: list[Task], output: Path | None) -> dict[str, Any]:
    models: list[dict[str, Any]] = []
    rows: list[Row] = []
    compared: list[dict[str, Any]] = []
    progress = PlainDisplay(Console(stderr=True))
    async with AsyncExitStack() as stack:
        folder = output.parent if output is not None else Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bbopd-eval-")))
        services = Services(RunFolder(folder), stack, progress)
        for name in args.model:
            progress.activity("loading", name)
            async with _opened(name, args) as subject:
                models.append(describe_subject(subject))
                for task in tasks:
                    progress.activity("evaluation", f"{name} on {task.info.name}: {task.info.items} items")
                    row = await run_task(task, subject, services)
                    compared += comparisons(rows, row)
                    rows.append(row)
                    found = document(shlex.join(sys.argv), tasks, models, rows, compared)
                    if output is not None:
                        _write(output, found)
    return found


@asynccontextmanager
async def _opened(name: str, args: argparse.Namespace) -> AsyncIterator[Subject]:
    """A model with what it writes by, until the tasks are done with it."""
    tokenizer = load_tokenizer(name)
    model = load_model(name, device=args.device, dtype=compute_dtype(args.dtype, resolve_device(args.device)))
    vocab_size = used_vocabulary(tokenizer, model.get_output_embeddings().weight.shape[0])
    end_ids = end_of_answer_ids(model, tokenizer)
    if args.engine == "hf":
        writer = HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size)
        yield Subject(name, model, tokenizer, engine=writer, vocab_size=vocab_size)
        return
    from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions

    longest = max_positions(model) or _VLLM_TOKENS
    options = VLLMOptions(longest, dtype=model.dtype, vocab_size=vocab_size)
    with tempfile.TemporaryDirectory(prefix="bbopd-eval-") as folder:
        engine = await VLLMEngine.start(model, options, eos_token_ids=end_ids, folder=folder)
        try:
            await engine.load_weights(model.named_parameters(), 1)
            yield Subject(name, model, tokenizer, engine=engine, vocab_size=vocab_size, engine_tokens=longest)
        finally:
            await engine.close()


def _check_output(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--output {path} is a folder: give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise ConfigError(f"--output {path} cannot be written: {error.strerror or error}") from error


def _write(path: Path, found: dict[str, Any]) -> None:
    unfinished = path.with_name(f"{path.name}.tmp")
    try:
        unfinished.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error
