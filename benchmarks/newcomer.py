"""A stranger's path, timed: clone, the README's first command, and a word from the model that it leaves.

    python3 -m benchmarks.newcomer
    python3 -m benchmarks.newcomer --demo-flags '--minutes 2 --plain'

Everything is new: the clone, its environment, pip's cache. The last commit is what is cloned. Any Python will do, with nothing installed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTIL = "distil a student"
ANSWER = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer, model = (kind.from_pretrained(sys.argv[1]) for kind in (AutoTokenizer, AutoModelForCausalLM))
asked = tokenizer("The sky is blue because", return_tensors="pt")
print(tokenizer.decode(model.generate(**asked, max_new_tokens=12, do_sample=False)[0], skip_special_tokens=True))
"""


@dataclass(frozen=True, slots=True)
class Step:
    what: str
    seconds: float


class Walk:
    """One walk, step after step, in ``folder``; a step that fails ends it with what it last wrote."""

    def __init__(self, folder: Path) -> None:
        self.clone, self._log = folder / "clone", folder / "log"
        self._environment = {**os.environ, "PIP_CACHE_DIR": str(folder / "pip"), "HF_HOME": str(folder / "hf"), "MAKEFLAGS": ""}
        self.steps: list[Step] = []

    def step(self, what: str, *command: str, where: Path | None = None) -> str:
        """Run ``command`` in the clone, or in ``where``; returns what it wrote."""
        started = time.perf_counter()
        with self._log.open("w+") as log:
            done = subprocess.run(
                command, cwd=where or self.clone, env=self._environment, stdout=log, stderr=subprocess.STDOUT, check=False
            )
            log.seek(0)
            written = log.read()
        if done.returncode:
            raise SystemExit(f"{what}: {shlex.join(command)} ended with {done.returncode}; the last it wrote:\n{written[-2000:]}")
        self.steps.append(Step(what, time.perf_counter() - started))
        print(f"{what}: {self.steps[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        return written


def walk(source: Path, folder: Path, demo_flags: str) -> tuple[list[Step], dict[str, float], str]:
    """From ``source`` to a first answer, all within ``folder``; the steps, the seconds of the run's activities, and the answer."""
    path = Walk(folder)
    path.step("clone", "git", "clone", "--quiet", str(source), str(path.clone), where=folder)
    path.step("set up the environment, build", "make", ".venv/.packaged")
    path.step(DISTIL, "make", "demo", *([f"DEMO_FLAGS={demo_flags}"] if demo_flags else []))
    run = path.clone / "runs" / "demo-seed0"
    summary = json.loads((run / "summary.json").read_text())
    answer = path.step("let it answer", str(path.clone / ".venv" / "bin" / "python"), "-W", "ignore", "-c", ANSWER, str(run / "model"))
    return path.steps, summary["seconds"], answer.strip().splitlines()[-1]


def table(steps: list[Step], activities: dict[str, float]) -> Iterator[str]:
    """A Markdown table of the steps, the run's own activities below the one that they are of."""
    yield "| step | seconds |"
    yield "|---|---:|"
    for step in steps:
        yield f"| {step.what} | {step.seconds:,.0f} |"
        if step.what == DISTIL:
            for name, seconds in sorted(activities.items(), key=lambda item: -item[1]):
                yield f"| – of these {name} | {seconds:,.0f} |"
    yield f"| **together** | **{sum(step.seconds for step in steps):,.0f}** |"


@contextmanager
def a_folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True)
        yield kept.resolve()
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT, help="the repository to clone (default: this one)")
    parser.add_argument("--demo-flags", default="", help="flags for bbopd demo (default: none, the README's command as it stands)")
    parser.add_argument("--folder", type=Path, help="a new folder to keep everything in (default: one that is removed)")
    options = parser.parse_args(arguments)
    with a_folder(options.folder) as folder:
        steps, activities, answer = walk(options.source, folder, options.demo_flags)
    where = f"{os.cpu_count()} cores, {platform.platform()}, Python {platform.python_version()}, {datetime.date.today():%d %B %Y}"
    print(where, *table(steps, activities), f"its words: {answer}", sep="\n")


if __name__ == "__main__":
    main()
