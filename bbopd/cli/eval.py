"""``bbopd eval MODEL``: bits per byte of held-out text and, where a teacher is named, agreement with it; or tasks (`eval_tasks`)."""

from __future__ import annotations

import argparse
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bbopd.cli.access import add_access_arguments, read_access
from bbopd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rich.table import Table

    from bbopd.config import RunConfig
    from bbopd.types import Prompt, Teacher


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="+", help="hub id, folder, or GGUF file of the model to measure; with --tasks several")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--tasks",
        metavar="TASK",
        nargs="+",
        help="task files (.yaml, .jsonl, .txt) and names of lm-evaluation-harness, by spaces or commas; given after the models",
    )
    source.add_argument("--text", metavar="SOURCE", help="all of this text: demo, a .jsonl file, a text file, or a folder of them")
    source.add_argument("--config", metavar="RUN.YAML", help="the held-out part of this run's data")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="lay one value over the run's file")
    teacher = parser.add_mutually_exclusive_group()
    teacher.add_argument(
        "--teacher", metavar="TARGET", action="append", help="also measure agreement with the teacher at grpc://host:port; once a replica"
    )
    teacher.add_argument("--teacher-model", metavar="MODEL", help="also measure agreement with this model, loaded here")
    parser.add_argument("--connect-timeout", type=float, default=10.0, help="seconds to go on trying to reach --teacher (default: 10)")
    parser.add_argument("--sequences", type=_positive, help="labelled sequences to score (default: 64, or the run's)")
    parser.add_argument(
        "--rollouts", type=_positive, help="answers to sample for the KL on the model's own text (default: 16, or the run's)"
    )
    parser.add_argument("--max-new-tokens", type=_positive, help="length of such an answer (default: 128, or the run's)")
    parser.add_argument(
        "--window",
        type=_positive,
        help="score whole documents, in windows of so many tokens that overlap by half, instead of continuations",
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="of the weights (default: auto)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    tasks = parser.add_argument_group("tasks", "with --tasks")
    tasks.add_argument("--output", metavar="FILE.JSON", help="keep the results, after every task")
    tasks.add_argument("--engine", default="hf", choices=("hf", "vllm"), help="what writes answers (default: hf)")
    tasks.add_argument("--limit", type=_positive, help="the first items of each task alone")
    tasks.add_argument("--fewshot", type=int, help="solved examples before a question of the harness (default: as its task says)")
    tasks.add_argument("--chat", action="store_true", help="ask the harness's tasks through the chat template; a task file says so itself")
    tasks.add_argument("--task-path", metavar="FOLDER", help="more task files of the harness, known by their names")
    add_access_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import asyncio

    from rich.console import Console

    if args.tasks:
        from bbopd.cli import eval_tasks

        _refuse_with_tasks(args)
        return eval_tasks.run(args)
    if len(args.model) > 1:
        raise ConfigError(f"several models ({', '.join(args.model)}) are compared on --tasks; without it, give one")
    args.model = args.model[0]
    result = asyncio.run(_evaluate(args))
    if args.json:
        print(json.dumps(result))
    else:
        Console().print(_table(result))
    return 0


def _refuse_with_tasks(args: argparse.Namespace) -> None:
    """What tasks say for themselves. Raises `ConfigError`."""
    for name, place in (
        ("teacher", "teacher: {target: ...}"),
        ("teacher_model", "teacher: {serve: {model: ...}}"),
        ("sequences", "limit"),
        ("rollouts", "rollouts"),
        ("max_new_tokens", "max_new_tokens"),
        ("window", "window"),
        ("set", None),
    ):
        if getattr(args, name):
            where = (
                "belongs to --config: leave it out" if place is None else f"has no meaning beside --tasks: write {place} into the task file"
            )
            raise ConfigError(f"--{name.replace('_', '-')} {where}")


async def _evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from bbopd.evaluate.bits_per_byte import token_byte_counts
    from bbopd.evaluate.suite import EvalSuite
    from bbopd.modeling import compute_dtype, load_model, load_tokenizer, resolve_device, used_vocabulary
    from bbopd.pipeline.preflight import check_lengths, check_vocabulary
    from bbopd.pipeline.student import end_of_answer_ids
    from bbopd.rollouts.hf import HFEngine
    from bbopd.teachers.fitted import fitted

    config = _run_config(args)
    tokenizer = load_tokenizer(args.model)
    prompts = _prompts(args, config, tokenizer)
    model = load_model(args.model, device=args.device, dtype=compute_dtype(args.dtype, resolve_device(args.device)))
    async with _teacher(args) as teacher:
        rows = model.get_output_embeddings().weight.shape[0]
        vocab_size = used_vocabulary(tokenizer, rows)
        if teacher is not None:
            vocab_size = check_vocabulary(teacher.info, tokenizer, rows)
            check_lengths(teacher.info, prompts, max_new_tokens=0 if args.window else config.eval.max_new_tokens)
        end_ids = end_of_answer_ids(model, tokenizer)
        suite = EvalSuite(
            prompts,
            config.eval,
            byte_counts_V=token_byte_counts(tokenizer),
            engine=None if args.window else HFEngine(model, eos_token_ids=end_ids, pad_token_id=end_ids[0], vocab_size=vocab_size),
            teacher=None if teacher is None else fitted(teacher, vocab_size),
            vocab_size=vocab_size,
        )
        result = await suite.run("eval", model, 0)
    return {
        "model": args.model,
        "text": args.text or args.config,
        "teacher": teacher.info.model if teacher is not None else None,
        **result.to_json(),
    }


def _run_config(args: argparse.Namespace) -> RunConfig:
    """The run's own configuration, or one that takes its text from ``--text``; the sizes given as options over either."""
    from bbopd.config import DataConfig, EvalConfig, ObjectiveConfig, PromptSource, RolloutsConfig, RunConfig, StudentConfig, TrainConfig
    from bbopd.config_file import load_config

    if args.config:
        config = load_config(args.config, args.set)
    elif args.set:
        raise ConfigError("--set lays values over the file of --config: give that too, or leave --set out")
    else:
        path = Path(args.text).expanduser()
        if args.text == "demo":
            source = PromptSource(demo=True)
        else:
            source = PromptSource(jsonl=str(path)) if path.suffix == ".jsonl" else PromptSource(text=str(path))
        config = RunConfig(
            student=StudentConfig(model=args.model),
            objective=ObjectiveConfig(name="sft"),
            rollouts=RolloutsConfig(on_policy_fraction=0.0),
            train=TrainConfig(labelled_tokens=1_000_000),
            data=DataConfig(prompts=(source,)),
            eval=EvalConfig(sequences=64),
        )
    sizes = {"sequences": args.sequences, "rollouts": args.rollouts, "max_new_tokens": args.max_new_tokens}
    given = {name: value for name, value in sizes.items() if value is not None}
    return config.model_copy(update={"eval": config.eval.model_copy(update=given)})


def _prompts(args: argparse.Namespace, config: RunConfig, tokenizer: Any) -> list[Prompt]:
    from bbopd.data.prompts import load_prompts

    if args.window:
        return _windows(args.window, config, tokenizer)
    found = load_prompts(
        config.data,
        tokenizer,
        max_seq_len=config.train.max_seq_len,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=config.eval.max_new_tokens,
    )
    return found.held_out if args.config else [*found.train, *found.held_out]


def _windows(window: int, config: RunConfig, tokenizer: Any) -> list[Prompt]:
    from bbopd.data.sources import read_documents
    from bbopd.evaluate.bits_per_byte import document_windows

    if window < 2:
        raise ConfigError(f"--window {window} leaves no context: give at least 2")
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    documents = [document for source in config.data.prompts for document in read_documents(source) if document.text]
    if not documents:
        raise DataError("--window needs running text, and there is none but questions and answers: leave it out to score the answers")
    return [
        prompt
        for document in documents
        for prompt in document_windows(
            document.name,
            tokenizer.encode(document.text, add_special_tokens=False, verbose=False),
            window=window,
            stride=max(1, window // 2),
            start_token_id=start,
        )
    ]


@asynccontextmanager
async def _teacher(args: argparse.Namespace) -> AsyncIterator[Teacher | None]:
    """The teacher that the options name, connected or loaded, and closed at the end."""
    if args.teacher:
        from bbopd.teachers.remote import RemoteTeacher

        remote = await RemoteTeacher.connect(args.teacher, access=read_access(args), connect_timeout=args.connect_timeout)
        try:
            yield remote
        finally:
            await remote.close()
    elif args.teacher_model:
        from bbopd.config import ServeConfig
        from bbopd.teachers.hf import HFBackend
        from bbopd.teachers.local import LocalTeacher

        local = LocalTeacher(HFBackend.from_config(ServeConfig(model=args.teacher_model, device=args.device, dtype=args.dtype)))
        try:
            yield local
        finally:
            await local.close()
    else:
        yield None


def _table(result: dict[str, Any]) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from bbopd.report.load import RunData
    from bbopd.report.table import KL_NOTE, result_rows

    against = f", against {result['teacher']}" if result["teacher"] else ""
    counts = ", ".join(
        f"{count} tokens of {name.replace('_', ' ')} in {result['sequences'][name]} sequences" for name, count in result["tokens"].items()
    )
    table = Table(
        title=f"{result['model']}{against}", title_justify="left", caption=f"{counts}. {KL_NOTE}.", caption_justify="left", box=SIMPLE_HEAD
    )
    for title in ("Measure", "value", "± s.e.", "unit"):
        table.add_column(title, justify="left" if title in ("Measure", "unit") else "right")
    for row in result_rows(RunData(result["model"], (), [result], {}, {})):
        table.add_row(row.title, row.values[0], row.errors[0], row.unit)
    return table


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value
