"""``bbopd init``: five questions, and the file of a run that ``bbopd doctor`` passes, each line with its meaning."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from bbopd.errors import BbopdError, ConfigError, DataError

_ADDRESSES = ("grpc://", "openai://", "https://")
_SEQUENCE_TOKENS = 1024  # where the student's own limit is not known


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", default="run.yaml", help="the file to write, which must not be there yet (default: run.yaml)")
    for question in _QUESTIONS:
        parser.add_argument(f"--{question.name}", metavar=question.name.upper(), help=f"{question.asked} (default: {question.default})")
    parser.add_argument("--yes", action="store_true", help="ask nothing: take the defaults of what no flag says")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines; asks nothing, like --yes")


@dataclass(frozen=True, slots=True)
class _Teacher:
    """``target`` an address, or the ``model`` to start beside the run; of an endpoint ``model`` is its name there."""

    target: str | None
    model: str | None
    signal: str


class _Question(NamedTuple):
    name: str
    asked: str
    default: str
    read: Callable[[str], Any]


def run(args: argparse.Namespace) -> int:
    """Write the file. Raises `ConfigError` where it is there already, or an answer cannot be used; nothing is written then."""
    path = Path(args.config)
    if path.exists():
        raise ConfigError(f"{path} is there already: name another file, or remove it")
    is_quiet = args.yes or args.json
    answers = {one.name: _answer(one, getattr(args, one.name), is_quiet) for one in _QUESTIONS}
    text = _file(**answers)
    _check(text, path)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error
    following = [f"bbopd doctor {path}", f"bbopd distill {path}"]
    if args.json:
        print(json.dumps({"config": str(path), "next": following}))
    else:
        print(f"wrote {path}; next: {', then '.join(following)}")
    return 0


def _answer(question: _Question, given: str | None, is_quiet: bool) -> Any:
    """From the flag, the default, or whoever is asked; who answers what cannot be used is asked again."""
    if given is not None or is_quiet:
        return question.read(given or question.default)
    while True:
        print(f"{question.asked} [{question.default}]: ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            raise ConfigError(f"the answers end before {question.name}: answer all five questions, or give --{question.name} or --yes")
        try:
            return question.read(line.strip() or question.default)
        except BbopdError as error:
            print(f"  {error}")


def _check(text: str, path: Path) -> None:
    import yaml

    from bbopd.config import RunConfig
    from bbopd.config_file import parse_config

    parse_config(yaml.safe_load(text), (), RunConfig, str(path))


# ------------------------------------------------------------ what answers mean


def _teacher(answer: str) -> _Teacher:
    levels = ("full", "candidates", "topk", "sampled", "text")
    where, *rest = answer.split()
    is_api = where.startswith(_ADDRESSES[1:])
    signal = next((word for word in rest if word in levels), "text" if is_api else "full")
    names = [word for word in rest if word not in levels]
    if names and not (is_api and len(names) == 1):
        raise ConfigError(f"{answer}: {names[0]} is nothing that a teacher can give; write one of {', '.join(levels)}")
    if "://" in where and not where.startswith(_ADDRESSES):
        raise ConfigError(f"{where}: an address begins with {', '.join(_ADDRESSES)}")
    target = where if where.startswith(_ADDRESSES) else None
    return _Teacher(target, (names[0] if names else None) if target else where, signal)


def _source(answer: str) -> tuple[str, str]:
    """The key of ``data.prompts`` for a source, and its value."""
    path = Path(answer).expanduser()
    if answer == "demo":
        return "demo", "true"
    if path.is_dir():
        kinds = {file.suffix for file in path.iterdir()}
        return ("parquet" if ".parquet" in kinds else "dataset" if ".jsonl" in kinds else "text"), str(path)
    key = {".jsonl": "jsonl", ".parquet": "parquet"}.get(path.suffix, "text" if path.suffix or path.exists() else "dataset")
    if key != "dataset" and not path.is_file():
        raise DataError(f"there is no file {path}: give a file (.jsonl, .parquet, text), a folder, a dataset of the hub, or demo")
    return key, str(path) if key != "dataset" else answer


def _tokens(answer: str) -> int:
    units = {"k": 1_000, "m": 1_000_000}
    digits, unit = (answer[:-1], units[answer[-1].lower()]) if answer[-1:].lower() in units else (answer, 1)
    try:
        count = round(float(digits.replace("_", "").replace(",", "")) * unit)
    except ValueError:
        count = 0
    if count < 1:
        raise ConfigError(f"{answer} is no number of tokens: write 200000, 200k or 1M")
    return count


def _device(answer: str) -> str:
    if answer != "auto" and answer.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"{answer} is no place to run: write cpu, cuda, cuda:1 or auto")
    return answer


_QUESTIONS = (
    _Question("student", "The student: an id of the hub, a folder, or a GGUF file", "HuggingFaceTB/SmolLM2-135M-Instruct", str),
    _Question(
        "teacher",
        "The teacher: grpc://host:port, https://host/v1 MODEL, or a model to start beside the run; then what it can give: full, topk, "
        "candidates, sampled or text",
        "HuggingFaceTB/SmolLM2-360M-Instruct full",
        _teacher,
    ),
    _Question("data", "Prompts: a file (.jsonl, .parquet, text), a folder, a dataset of the hub, or demo", "demo", _source),
    _Question("tokens", "The budget: tokens to train on, 200k or 1M say", "100k", _tokens),
    _Question("device", "Where it runs: cpu, cuda, or auto for a GPU where there is one", "auto", _device),
)


# ------------------------------------------------------------ the file


def _file(student: str, teacher: _Teacher, data: tuple[str, str], tokens: int, device: str) -> str:
    """The YAML text, a comment beside every value."""
    longest = _longest(student)
    answer = longest // 2
    lines: list[tuple[str, str]] = [
        ("student:", ""),
        (f"  model: {_text(student)}", "who learns: an id of the hub, a folder, or a GGUF file"),
        (f"  device: {device}", "cpu, cuda or cuda:1; auto takes a GPU where there is one"),
        ("teacher:", ""),
        *_teacher_lines(teacher, device, min(answer, 256)),
        ("rollouts:", ""),
        ("  engine: hf", "what the student writes with: hf, or vllm where it is installed"),
        ("  per_update: 16", "sequences of an update cycle"),
        ("  samples_per_prompt: 2", "answers to each prompt of it"),
        (f"  max_new_tokens: {answer}", "the longest answer that the student writes"),
        ("  temperature: 1.0", "at which it samples"),
        (
            "  on_policy_fraction: 1.0",
            "share of the sequences that it writes itself; below 1 the rest is text of the data, with its continuation",
        ),
        ("objective:", ""),
        *_objective_lines(teacher.signal),
        ("train:", ""),
        ("  lr: 2.0e-5", "learning rate of AdamW"),
        ("  batch_tokens: 2048", "response tokens of an optimizer step, about"),
        (f"  max_seq_len: {longest}", "prompt and answer together, at most"),
        *(
            [(f"  labelled_tokens: {tokens}", "the budget: tokens of the teacher's answers to train on")]
            if teacher.signal == "text"
            else [(f"  on_policy_tokens: {tokens}", "the budget: tokens of the student's own answers to train on")]
        ),
        ("data:", ""),
        ("  prompts:", ""),
        (f"    - {data[0]}: {data[1] if data[0] == 'demo' else _text(data[1])}", "where prompts come from; more sources may follow"),
        ("  long_prompts: skip", "what happens to a prompt that leaves no room for an answer"),
        (f"output: {_text('runs/' + Path(student).stem.lower())}", "the run's folder; the same command goes on from what is there"),
    ]
    width = max(len(line) for line, comment in lines if comment and len(line) < 60) + 1
    return "".join(f"{line:<{width}} # {comment}\n" if comment else f"{line}\n" for line, comment in lines)


def _teacher_lines(teacher: _Teacher, device: str, answer: int) -> list[tuple[str, str]]:
    if teacher.target is None:
        lines = [("  serve:", ""), (f"    model: {_text(str(teacher.model))}", "started beside the run, in a process of its own")]
        lines += [(f"    device: {device}", "where it runs"), ("    port: 0", "any free one")]
    else:
        lines = [(f"  target: {_text(teacher.target)}", "where it answers")]
        if teacher.target.startswith("https://"):
            lines += [("  # token_env: TEACHER_TOKEN", "the environment variable with its key, where it wants one")]
        if teacher.model is not None:
            lines += [(f"  model: {_text(teacher.model)}", "its name there")]
    lines += [(f"  signal: {teacher.signal}", "what it is asked for: full, topk, candidates, sampled or text (its own answers)")]
    if teacher.signal in ("topk", "candidates"):
        lines += [("  topk: 64", "ids a token")]
    if teacher.signal == "text":
        lines += [("  answers:", ""), (f"    max_new_tokens: {answer}", "the longest answer that it writes")]
    return lines


def _objective_lines(signal: str) -> list[tuple[str, str]]:
    name, meaning = {
        "full": ("forward_kl", "KL(teacher || student), token by token"),
        "topk": ("forward_kl", "KL(teacher || student), token by token, on the teacher's best ids and their rest"),
        "candidates": ("reverse_kl", "KL(student || teacher), token by token, on the student's best ids and their rest"),
        "sampled": ("policy_gradient", "KL(student || teacher), from one logprob for each token"),
        "text": ("seqkd", "cross-entropy on answers that the teacher writes"),
    }[signal]
    lines = [(f"  name: {name}", f"{meaning}; `bbopd objectives` has the others")]
    if signal == "text":
        return lines
    temperature = 2.0 if signal == "full" else 1.0
    return [
        *lines,
        ("  alpha: 0.0", "weight of cross-entropy on the data's own text; the rest is the teacher's"),
        (
            f"  temperature: {temperature}",
            "of both distributions" if signal == "full" else "1 where the teacher gives less than all logits",
        ),
        ("  ramp: 0", "steps, or share of the run, over which the teacher's weight rises"),
    ]


def _longest(student: str) -> int:
    """Tokens of a sequence: what a student that lies here says that it takes, up to 1,024."""
    try:
        shape = json.loads((Path(student).expanduser() / "config.json").read_text(encoding="utf-8"))
        return min(_SEQUENCE_TOKENS, int(shape.get("max_position_embeddings", _SEQUENCE_TOKENS)))
    except (OSError, ValueError):
        return _SEQUENCE_TOKENS


def _text(value: str) -> str:
    """``value`` as YAML reads it back, in quotes where it needs them."""
    import yaml

    return str(yaml.safe_dump(value, width=10_000).splitlines()[0])
