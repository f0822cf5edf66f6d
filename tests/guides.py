"""The guides as a reader follows them: files and commands are taken from the page, and run in an empty folder.

A block below a line that ends with a file's name and a colon (``The run, `run.yaml`:``) is that file; a block of ``sh`` is commands.
Models, addresses and budgets become small ones; all else is what stands on the page.
"""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import yaml

from bbopd.cli.main import build_parser, main
from bbopd.cli.serve import _configuration
from bbopd.config_file import _with_override, read_yaml
from bbopd.rpc.security import ServerAccess
from bbopd.teachers.hf import HFBackend
from tests.openai_runs import served
from tests.openai_server import OpenAIServer
from tests.serving import serving
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.waiting import unused_port

GUIDES = Path(__file__).resolve().parent.parent / "docs" / "guides"
TEACHER, STUDENT = "HuggingFaceTB/SmolLM2-1.7B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"
PORTS = ("7070", "7071", "7443", "8000")
LENGTHS = ("data.prompt_tokens=40", "data.response_tokens=40")

SMALL = {
    "distill": (
        *("student.dtype=float32", "rollouts.per_update=4", "rollouts.samples_per_prompt=2", "rollouts.max_new_tokens=8"),
        *("rollouts.max_staleness=0", "train.batch_tokens=64", "train.max_seq_len=96", "train.on_policy_tokens=40", *LENGTHS),
        *("data.filters={min_tokens: 1, max_repetition: 1.0, reject_duplicates: false}",),
        *("eval.every=0", "eval.sequences=2", "eval.rollouts=2", "eval.max_new_tokens=8", "eval.samples=1"),
    ),
    "doctor": ("student.dtype=float32", "rollouts.per_update=4", "rollouts.max_new_tokens=8", "train.max_seq_len=96", *LENGTHS),
    "compare": ("seeds=[0]", "learning_rates=[1.0e-5]", "budget.tokens=60", "measures.max_new_tokens=8"),
    "plan": ("train.max_seq_len=512",),
}
LITTLE_MONEY = 8e-5  # with which a run stops half-way, so that the page's own command can go on
TEXT_ONLY = ("train.cold_start_tokens=40", "train.labelled_tokens=40", "teacher.answers.max_new_tokens=8")


class Block(NamedTuple):
    language: str
    file: str | None
    text: str


def blocks_of(page: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found, language, file, inside = [], None, None, []
    before = ""
    for line in page.splitlines():
        if line.startswith("```"):
            if language is None:
                language, inside = line[3:].strip(), []
                name = re.search(r"`([\w.]+\.\w+)`:$", before)
                file = name[1] if name else None
            else:
                found.append(Block(language, file, "\n".join(inside) + "\n"))
                language, before = None, ""
        elif language is not None:
            inside.append(line)
        elif line.strip():
            before = line.strip()
    return found


def questions(count: int) -> Iterator[str]:
    for n in range(count):
        yield json.dumps({"prompt": f"{n} the thin thing in", "response": f"there, then {n * n} more of them and so on"})


class Guide:
    """One page, made small, in a folder of its own."""

    def __init__(self, name: str, folder: Path, api: str | None = None) -> None:
        """``api``: an endpoint that is there already, in place of the page's."""
        self.folder = folder
        self.blocks = blocks_of((GUIDES / f"{name}.md").read_text(encoding="utf-8"))
        self.tokenizer = tiny_tokenizer()
        self.teacher = save_folder(folder / "teacher", tiny_llama(vocab_size=262, seed=1), self.tokenizer)
        self.student = save_folder(folder / "student", tiny_llama(vocab_size=262), self.tokenizer)
        ports = {port: str(unused_port()) for port in PORTS}
        self._replaced = {
            **({} if api is None else {"openai://localhost:8000/v1": api}),
            TEACHER: str(self.teacher),
            STUDENT: str(self.student),
            "https://api.example.com/v1": f"openai://localhost:{ports['8000']}/v1",
            "model: a-model-of-theirs": "model: tiny",
            "host: 0.0.0.0": "host: 127.0.0.1",
            **ports,
        }
        self.port = int(ports["8000"])

    def small(self, text: str) -> str:
        for given, small in self._replaced.items():
            text = text.replace(given, small)
        return text

    def write_files(self) -> list[Path]:
        """The page's files; those of questions with more lines, as real ones have."""
        (self.folder / "questions.jsonl").write_text("\n".join(questions(40)) + "\n")
        for name in ("test.jsonl", "development.jsonl"):
            (self.folder / name).write_text("\n".join(questions(6)) + "\n")
        written = []
        for block in self.blocks:
            if block.file is not None:
                path = self.folder / block.file
                path.write_text(self.small(block.text) + ("\n".join(questions(40)) if path.suffix == ".jsonl" else ""))
                written.append(path)
        if (self.folder / "compare.yaml").exists():
            base = self.folder / "base.yaml"
            data = read_yaml(base)
            for text in SMALL["distill"]:
                data = _with_override(data, text)
            base.write_text(yaml.safe_dump(data))
        return written

    @property
    def commands(self) -> list[str]:
        lines = [line for block in self.blocks if block.language == "sh" for line in block.text.splitlines()]
        return [self.small(line.split(" # ")[0].strip()) for line in lines if line.strip()]

    @property
    def needs_api(self) -> bool:
        """Whether the page asks an endpoint that none of its commands starts."""
        text = "".join(block.text for block in self.blocks)
        return ("openai://" in text or "https://" in text) and "vllm serve" not in text

    def run(self, stack: ExitStack, about: str = "") -> list[str]:
        """Run every command that has ``about`` in it in this process, servers beside it until ``stack`` ends. Returns what was run."""
        commands = [command for command in self.commands if about in command]
        for command in commands:
            self._run(shlex.split(command.removesuffix("&")), command, stack)
        return commands

    def serve_api(self, stack: ExitStack) -> None:
        """An OpenAI-compatible endpoint of the teacher, as vLLM's, at the port of the page."""
        backend = HFBackend(tiny_llama(vocab_size=262, seed=1), self.tokenizer, name="tiny")
        server = OpenAIServer(
            backend, decode=self.tokenizer.decode, encode=self.tokenizer.encode, max_top_k=64, grade=_graded(backend, self)
        )
        stack.enter_context(served(server, self.port))

    def _run(self, words: list[str], command: str, stack: ExitStack) -> None:
        match words:
            case ["bbopd", "serve", *_]:
                config = _configuration(build_parser().parse_args(words[1:])).model_copy(update={"engine": "hf", "dtype": "float32"})
                stack.enter_context(serving(HFBackend.from_config(config), port=config.port, access=ServerAccess.from_config(config)))
            case ["vllm", "serve", *_]:
                self.serve_api(stack)
            case ["bbopd", name, *_]:
                settings = self.settings(name, words[2])
                if name == "distill" and "budget: {" in Path(words[2]).read_text() and "--set" not in words:
                    assert main([*words[1:], "--plain", *settings, "--set", f"teacher.budget.limit={LITTLE_MONEY}"]) == 7, command
                else:
                    assert main([*words[1:], *(["--plain"] if name == "distill" else []), *settings]) == 0, command
            case ["torchrun", *options, "-m", "bbopd", "distill", path]:
                given = [*options, "-m", "bbopd", "distill", path, *self.settings("distill", path)]
                ranks = subprocess.run([sys.executable, "-m", "torch.distributed.run", *given], capture_output=True, text=True, check=False)
                assert ranks.returncode == 0, f"{command}: {ranks.stderr[-3000:]}"
            case ["python", path]:
                runpy.run_path(path, run_name="__main__")
            case ["export", assignment]:
                os.environ.update([assignment.split("=", 1)])
            case _:
                subprocess.run(command, shell=True, check=True, capture_output=True)

    def settings(self, name: str, path: str) -> list[str]:
        """What makes a run small: ``--set`` and its values, after those of the page."""
        values = list(SMALL.get(name, ()))
        text = Path(path).read_text() if values and path.endswith(".yaml") else ""
        if "signal: text" in text and name != "plan":
            values += [value for value in TEXT_ONLY if "cold_start" not in value or "gad" in text]
        if "name: gad" in text or "name: verbal" in text:
            values = [value for value in values if "min_tokens" not in value] + ["data.filters={min_tokens: 1}"]
        return [word for value in values for word in ("--set", value)]


def _graded(backend: HFBackend, guide: Guide):
    """A teacher that knows two kinds of question: one for grades, and any other, which it answers in its own words."""

    def reply(messages: list[dict[str, str]]) -> str:
        asked = messages[-1]["content"]
        if "Rubric:" in asked:
            return json.dumps({"truth": 1 + len(asked) % 10, "style": 1 + len(asked) * 7 % 10})
        return f"then the thing in {len(asked)}"

    return reply
