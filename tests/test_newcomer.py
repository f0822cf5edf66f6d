"""The timed walk of a newcomer, over a small repository of its own: a clone, its two commands, and a model that answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.newcomer import DISTIL, main, table, walk
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

MAKEFILE = """
.venv/.packaged:
\tmkdir -p .venv/bin && printf '#!/bin/sh\\nexec {python} "$$@"\\n' > .venv/bin/python && chmod +x .venv/bin/python && touch $@
demo: .venv/.packaged
\ttest "$(DEMO_FLAGS)" = "--minutes 1"
\tmkdir -p runs/demo-seed0 && cp -r model runs/demo-seed0/model
\techo '{{"seconds": {{"training": 3.0, "loading": 5.0}}}}' > runs/demo-seed0/summary.json
"""


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    save_folder(folder / "model", tiny_llama(vocab_size=262), tiny_tokenizer())
    (folder / "Makefile").write_text(MAKEFILE.format(python=sys.executable))
    git = ("git", "-c", "user.name=n", "-c", "user.email=n@example.com")
    for words in (("init", "-q"), ("add", "-A"), ("commit", "-qm", "all")):
        subprocess.run([*git, *words], cwd=folder, check=True)
    return folder


@pytest.mark.slow  # it loads transformers in an interpreter of its own
def test_every_step_is_timed_and_the_student_answers(repository, tmp_path):
    steps, activities, answer = walk(repository, tmp_path, "--minutes 1")
    assert [step.what for step in steps] == ["clone", "set up the environment, build", DISTIL, "let it answer"]
    assert all(step.seconds > 0 for step in steps)
    assert answer.startswith("The sky is blue because")
    lines = list(table(steps, activities))
    assert lines[5:7] == ["| – of these loading | 5 |", "| – of these training | 3 |"]
    assert lines[-1] == f"| **together** | **{sum(step.seconds for step in steps):,.0f}** |"


def test_a_step_that_fails_ends_the_walk_with_what_it_wrote(repository, tmp_path):
    with pytest.raises(SystemExit, match=r"distil a student: make demo ended with 2; the last it wrote:"):
        main(["--source", str(repository), "--folder", str(tmp_path / "new")])
