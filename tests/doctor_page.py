"""Set-ups of a run, good and broken, each with real teachers behind gRPC; and the page that shows what `bbopd doctor` says of them.

``python -m tests.doctor_page`` writes the page; ``test_doctor.py`` holds it to what the doctor says now, but for figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bbopd.cli.doctor import line_of
from bbopd.config import RunConfig
from bbopd.config_file import parse_config
from bbopd.doctor.examine import examine_run
from bbopd.doctor.findings import Finding
from bbopd.errors import ConfigError
from bbopd.modeling import load_model, load_tokenizer
from bbopd.rpc.server import start_server
from bbopd.teachers.hf import HFBackend
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

PAGE = Path(__file__).parents[1] / "docs" / "doctor.md"
BEGIN, END = "<!-- what it says: written by `python -m tests.doctor_page` -->", "<!-- end -->"
OTHER_MERGES = (("o", "u"), ("ou", "t"), ("i", "n"))
TEXT = "the thing in the theory begins within this thin line and nothing other than the inner end of it "


@dataclass(frozen=True, slots=True)
class Teacher:
    """One replica: what it serves (a folder of the set-up), and what it offers of that."""

    model: str = "teacher"
    options: dict[str, Any] = field(default_factory=dict)
    name: str = "teacher"


@dataclass(frozen=True, slots=True)
class Case:
    """One set-up: its teachers, what is laid over the run's file, and what is done to its folders first."""

    title: str
    about: str
    teachers: tuple[Teacher, ...] = (Teacher(),)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    prepare: Callable[[Path], None] | None = None


def _without_end(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder / "student")
    (folder / "student" / "chat_template.jinja").unlink()


def _questions(folder: Path, field: str) -> None:
    """A task of six questions, the last of which is long."""
    (folder / "quiz.yaml").write_text(f"data: quiz.jsonl\nprompt: {field}\nchoices: [the, thin]\nanswer: answer\n")
    rows = [{"question": "thing " * (600 if number == 5 else 3), "answer": "thin"} for number in range(6)]
    (folder / "quiz.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


CASES = {
    "good": Case("A good run", "Student and teacher are of one family; all is well."),
    "padded": Case(
        "Padded vocabularies",
        "The student's head has more rows than there are tokens: those of no token are left out on both sides.",
        sections={"student": {"model": "padded"}},
    ),
    "tokenizer": Case(
        "Another tokenizer",
        "The teacher has as many tokens as the student, and some of them are others: every answer would look all right.",
        (Teacher("foreign", name="foreign"),),
    ),
    "text": Case(
        "Another tokenizer, and the teacher's text",
        "The same teacher, heard by what it writes (`objective.name=seqkd`, `teacher.signal=text`): no token needs to be the same.",
        (Teacher("foreign", name="foreign"),),
        {
            "teacher": {"signal": "text", "answers": {"max_new_tokens": 16}},
            "objective": {"name": "seqkd"},
            "train": {"labelled_tokens": 4000},
        },
    ),
    "aligned": Case(
        "Another tokenizer, laid beside the student's",
        "The same teacher, asked about its own tokens of the student's text (`objective.name=aligned`).",
        (Teacher("foreign", name="foreign"),),
        {"teacher": {"topk": 16, "tokenizer": "foreign"}, "objective": {"name": "aligned", "temperature": 1.0}},
    ),
    "too_long": Case(
        "Answers longer than the teacher allows",
        "The teacher takes 24 tokens a sequence, a prompt with its answer may have more.",
        (Teacher(options={"max_sequence_tokens": 24}),),
    ),
    "not_offered": Case(
        "A teacher that gives less than is asked for",
        "The run wants whole distributions at T = 2, the teacher gives its best ids, at T = 1 alone.",
        (Teacher(options={"levels": ("topk", "sampled", "text")}),),
        {"objective": {"temperature": 2.0}},
    ),
    "temperature": Case(
        "T = 2 from the best ids",
        "Above T = 1 the teacher's best ids hold too little of the mass: refused from the file alone, before anything is opened.",
        sections={"teacher": {"topk": 16}},
    ),
    "nobody": Case(
        "No teacher there",
        "Nothing listens at the address: a failing line, not a hang.",
        sections={"teacher": {"target": "grpc://127.0.0.1:9", "start_timeout": 2.0}},
    ),
    "replicas": Case(
        "Replicas that differ",
        "Two replicas that describe themselves alike, one of which serves other weights.",
        (Teacher(), Teacher("changed")),
    ),
    "task_field": Case(
        "A task that asks for a field which is not there",
        "A run with `eval.tasks` would find out at its first evaluation; here nothing has been spent.",
        sections={"eval": {"tasks": ["quiz.yaml"]}},
        prepare=partial(_questions, field="text"),
    ),
    "task_room": Case(
        "A task with an item that is too long for the student",
        "It could be asked, without the beginning of its prompt.",
        sections={"eval": {"tasks": ["quiz.yaml"]}},
        prepare=partial(_questions, field="question"),
    ),
    "no_end": Case("A tokenizer without an end of text", "Its rollouts would never end.", prepare=_without_end),
}


def make_folders(folder: Path) -> None:
    """Models of all set-ups: a student and a teacher of one family, one with other tokens, one with other weights, one padded."""
    save_folder(folder / "student", tiny_llama(262, layers=2), tiny_tokenizer())
    save_folder(folder / "teacher", tiny_llama(262, seed=1, layers=2), tiny_tokenizer())
    save_folder(folder / "foreign", tiny_llama(262, seed=1, layers=2), tiny_tokenizer(OTHER_MERGES))
    save_folder(folder / "changed", tiny_llama(262, seed=2, layers=2), tiny_tokenizer())
    save_folder(folder / "padded", tiny_llama(272, layers=2), tiny_tokenizer())
    (folder / "corpus.txt").write_text("\n\n\n".join(f"{number} " + TEXT * (2 + number % 3) for number in range(20)))


def run_config(case: Case, targets: list[str]) -> RunConfig:
    """The run of a set-up, its folders being the current one's. Raises `ConfigError` as ``bbopd doctor`` would."""
    sections: dict[str, dict[str, Any]] = {
        "student": {"model": "student", "dtype": "float32"},
        "teacher": {"target": targets, "start_timeout": 60.0, "timeout": 60.0},
        "rollouts": {"per_update": 4, "max_new_tokens": 16, "max_staleness": 0},
        "objective": {"ramp": 0.2},
        "train": {"batch_tokens": 64, "max_seq_len": 64, "on_policy_tokens": 4000},
        "data": {"prompts": [{"text": "corpus.txt"}], "prompt_tokens": 12, "response_tokens": 16},
        "eval": {"max_new_tokens": 16},
        "output": "run",
    }
    for name, values in case.sections.items():
        sections[name] = {**sections[name], **values}
    return parse_config(sections, [], RunConfig, "run.yaml")


@contextlib.asynccontextmanager
async def serving(teachers: tuple[Teacher, ...]) -> AsyncIterator[list[str]]:
    """The addresses of real servers."""
    async with contextlib.AsyncExitStack() as stack:
        targets = []
        for teacher in teachers:
            backend = HFBackend(load_model(teacher.model), load_tokenizer(teacher.model), name=teacher.name, **teacher.options)
            server = await start_server(backend)
            stack.push_async_callback(server.stop, 0)
            targets.append(f"grpc://127.0.0.1:{server.port}")
        yield targets


async def examine_case(case: Case) -> list[Finding]:
    """What the doctor says of a set-up, in the current folder, where `make_folders` has been."""
    if case.prepare is not None:
        case.prepare(Path())
    async with serving(case.teachers) as targets:
        try:
            config = run_config(case, targets)
        except ConfigError as error:
            return [Finding("configuration", "fail", " ".join(str(error).split()), 0.0)]
        return [finding async for finding in examine_run(config, time_limit=60.0)]


def page(findings: dict[str, list[Finding]]) -> str:
    """The generated part: every set-up with its lines, those skipped for want of another left out of none."""
    parts = []
    for name, lines in findings.items():
        case = CASES[name]
        parts.append(f"### {case.title}\n\n{case.about}\n\n```\n" + "\n".join(map(line_of, lines)) + "\n```")
    return "\n\n".join(parts)


def written() -> str:
    """What the page shows."""
    _, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert begin, f"{PAGE.name} has no line {BEGIN}"
    return rest.partition(END)[0].strip()


def without_figures(text: str) -> str:
    """Figures are a machine's, and hashes a library's; units change with them."""
    text = re.sub(r"\b[0-9a-f]{12}\.\.\.", "#", text)
    text = re.sub(r"\d[\d.,]*(e[+-]\d+)?", "#", text)
    return re.sub(r"# (s|min|h|B|KB|MB|GB|TB)\b", "# unit", text)


async def examine_all(folder: Path) -> dict[str, list[Finding]]:
    findings = {}
    for name, case in CASES.items():
        here = folder / name
        here.mkdir()
        make_folders(here)
        with contextlib.chdir(here):
            findings[name] = await examine_case(case)
    return findings


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
        shown = page(asyncio.run(examine_all(Path(scratch))))
        PAGE.write_text(f"{before}{BEGIN}\n\n{shown}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")
