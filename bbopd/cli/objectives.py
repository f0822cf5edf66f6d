"""``bbopd objectives``: what each objective needs of a teacher, computes and costs, and which of them a teacher can serve."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bbopd import __version__
from bbopd.cli.access import add_access_arguments, read_access
from bbopd.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from bbopd.config import RunConfig
    from bbopd.objectives import Facts
    from bbopd.plugins import Plugin
    from bbopd.types import Level, TeacherInfo

_VOCABULARY = 128_256  # Llama 3's, where nothing names another
_TOP_K = 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a run's YAML file: mark what fits its student and its teacher")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay one value over the file; may be repeated")
    parser.add_argument("--teacher", metavar="TARGET", help="mark what fits the teacher at grpc://host:port")
    parser.add_argument("--connect-timeout", type=float, default=10.0, help="seconds to go on trying to reach a teacher (default: 10)")
    parser.add_argument("--vocab", type=int, help=f"tokens of the student, for bytes a token (default: the teacher's, or {_VOCABULARY:,})")
    parser.add_argument("--topk", type=int, help=f"ids a token, for the same (default: the run's, or {_TOP_K})")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    add_access_arguments(parser)


@dataclass(frozen=True, slots=True)
class _Teacher:
    """Whom the table is marked for. ``same_tokens`` is None where nobody knows whether the student's are the same."""

    name: str
    levels: tuple[Level, ...]
    vocab_size: int | None = None
    same_tokens: bool | None = None


def run(args: argparse.Namespace) -> int:
    import asyncio

    config, teacher = asyncio.run(_subject(args))
    vocabulary = args.vocab or (teacher.vocab_size if teacher is not None else None) or _VOCABULARY
    top_k = args.topk or (config.teacher.topk if config is not None else _TOP_K)
    if vocabulary < 1 or top_k < 1:
        raise ConfigError(f"--vocab {vocabulary} and --topk {top_k}: give positive numbers")
    rows = _rows(teacher, vocabulary, top_k)
    if args.json:
        shown = None if teacher is None else asdict(teacher)
        print(json.dumps({"vocabulary": vocabulary, "topk": top_k, "teacher": shown, "objectives": rows}))
        return 0
    if teacher is not None:
        print(f"teacher {teacher.name} offers {', '.join(teacher.levels) or 'nothing'}{_said_of_tokens(teacher)}")
    print(f"{vocabulary:,} tokens; of text, bytes are those of a token written; student: what it does beside training\n")
    for row in rows:
        print("\n".join(_lines(row, top_k, None if config is None else config.objective.name)))
    return 0


def _rows(teacher: _Teacher | None, vocabulary: int, top_k: int) -> list[dict[str, Any]]:
    from bbopd.objectives import FACTS, fitting
    from bbopd.rpc.answers import token_bytes
    from bbopd.types import SignalSpec

    plugged = _plugged()
    known = {**FACTS, **{plugin.name: facts for plugin, facts in plugged.items()}}
    packages = {plugin.name: f"{plugin.package} {plugin.version}" for plugin in plugged}
    fit = fitting(teacher.levels, known) if teacher is not None else {}
    rows = []
    for name, facts in known.items():
        row = {"name": name, "package": packages.get(name, f"bbopd {__version__}"), **asdict(facts)}
        row["bytes_per_token"] = {level: token_bytes(SignalSpec(level, top_k=top_k), vocabulary, top_k) for level in facts.needs}
        if teacher is not None:
            row["fits"] = name in fit and not (facts.same_tokens and teacher.same_tokens is False)
            row["signals"] = list(fit[name]) if row["fits"] else []
        rows.append(row)
    return rows


def _plugged() -> dict[Plugin, Facts]:
    """Those of other packages; one that does not work is named on the error stream, and left out."""
    from bbopd.objectives import plugin_facts
    from bbopd.plugins import find, installed

    found = {}
    for plugin in installed("objectives"):
        try:
            found[find("objectives", plugin.name)] = plugin_facts(plugin)
        except ConfigError as error:
            print(f"left out: {error}", file=sys.stderr)
    return found


def _lines(row: dict[str, Any], top_k: int, chosen: str | None) -> Iterator[str]:
    """What is printed of one objective."""
    marks = [f"of {row['package']}"] if not row["package"].startswith("bbopd ") else []
    marks += ["the run's"] if row["name"] == chosen else []
    if "fits" in row:
        marks.append(("fits, with " + " or ".join(row["signals"]) if row["signals"] else "fits") if row["fits"] else "does not fit")
    yield row["name"] + (f"  [{'; '.join(marks)}]" if marks else "")
    yield f"  loss     {row['computes']}"
    costs = [f"{level}{f' {top_k}' if level in ('candidates', 'topk') else ''}: {size:,}" for level, size in row["bytes_per_token"].items()]
    yield f"  signals  {', '.join(costs) + ' bytes a token' if costs else 'none'}"
    yield f"  teacher  {row['teacher_work']}"
    yield f"  student  {row['student_work']}"
    yield f"  source   {row['source']}"


def _said_of_tokens(teacher: _Teacher) -> str:
    if teacher.same_tokens is None:
        return "; whether its tokens are the student's is not known here, which all but sft, seqkd, verbal, gad and aligned need"
    return "; its tokens are the student's" if teacher.same_tokens else "; its tokens are not the student's"


async def _subject(args: argparse.Namespace) -> tuple[RunConfig | None, _Teacher | None]:
    """The run and the teacher that the options name, each None where they name none."""
    from bbopd.config_file import load_config

    if args.set and args.config is None:
        raise ConfigError("--set lays values over a run's file: name that too, or leave --set out")
    config = load_config(args.config, args.set) if args.config is not None else None
    if args.teacher is None and (config is None or config.teacher.signal == "none"):
        return config, None
    if args.teacher is None and config is not None and config.teacher.serve is not None:
        served = config.teacher.serve
        levels = served.levels if served.engine == "hf" else tuple(one for one in served.levels if one in ("topk", "sampled", "text"))
        return config, _Teacher(served.model, levels)
    async with AsyncExitStack() as stack:
        info = await _info(args, config, stack)
    offered = tuple(offer.level for offer in info.offers)
    return config, _Teacher(info.model, offered, info.vocab_size, None if config is None else _has_same_tokens(config, info))


async def _info(args: argparse.Namespace, config: RunConfig | None, stack: AsyncExitStack) -> TeacherInfo:
    """What the teacher says of itself. Raises `TeacherError` where it does not answer."""
    from bbopd.modeling import load_tokenizer
    from bbopd.pipeline.plugged import open_plugged_teacher
    from bbopd.pipeline.progress import Silent
    from bbopd.pipeline.teacher import open_api
    from bbopd.rpc.security import ClientAccess
    from bbopd.teachers.remote import RemoteTeacher

    if args.teacher is None and config is not None and config.teacher.plugin is not None:
        tokenizer = load_tokenizer(config.student.model, revision=config.student.revision)
        return (await open_plugged_teacher(config.teacher, tokenizer, len(tokenizer), stack, Silent())).info
    if args.teacher is None and config is not None and config.teacher.is_api:
        tokenizer = load_tokenizer(config.teacher.tokenizer or config.student.model)
        return (await open_api(config.teacher, tokenizer, len(tokenizer), None, stack, Silent())).info
    if args.teacher is not None and not args.teacher.startswith("grpc://"):
        raise ConfigError(f"--teacher {args.teacher}: give grpc://host:port; an OpenAI-compatible endpoint goes into a run's file")
    access = read_access(args) if args.teacher is not None or config is None else ClientAccess.from_config(config.teacher)
    targets = [args.teacher] if args.teacher is not None or config is None else list(config.teacher.targets)
    remote = await RemoteTeacher.connect(targets, access=access, connect_timeout=args.connect_timeout)
    stack.push_async_callback(remote.close)
    return remote.info


def _has_same_tokens(config: RunConfig, info: TeacherInfo) -> bool | None:
    """Whether the teacher numbers the student's tokens alike; None where it does not say which it has."""
    from bbopd.modeling import load_tokenizer
    from bbopd.pipeline.preflight import check_vocabulary

    tokenizer = load_tokenizer(config.student.model, revision=config.student.revision)
    if not info.vocab_sha256:
        return None
    try:
        check_vocabulary(info, tokenizer, len(tokenizer))
    except TeacherError:
        return False
    return True
