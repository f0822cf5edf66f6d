"""The examples, run as a reader runs them: the fused loss is the ordinary one, in less memory."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from bbopd.teachers.hf import HFBackend
from tests.guides import questions
from tests.openai_runs import served
from tests.openai_server import CHAT, OpenAIServer
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LINE = re.compile(r"^(before|after) +loss ([\d.]+) -> ([\d.]+) +([\d.]+) s a step +([\d,]+) MiB", re.MULTILINE)


class Measured(NamedTuple):
    losses: tuple[float, float]
    seconds: float
    mebibytes: float


def run(*words: str) -> dict[str, Measured]:
    """What an example printed of each way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = LINE.findall(done.stdout)
    assert found, done.stdout
    return {name: Measured((float(a), float(b)), float(spent), float(most.replace(",", ""))) for name, a, b, spent, most in found}


def hold(before: Measured, after: Measured) -> None:
    assert after.losses == pytest.approx(before.losses, rel=1e-3)
    assert after.losses[1] < after.losses[0]
    assert after.mebibytes < 0.7 * before.mebibytes


def test_plain_pytorch():
    ways = run(str(EXAMPLES / "plain_pytorch.py"), "--vocabulary", "8000", "--sequences", "8", "--width", "32", "--steps", "2")
    hold(ways["before"], ways["after"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'bbopd[examples]'")
def test_in_trl():
    ways = run(str(EXAMPLES / "trl_distillation.py"))
    hold(ways["before"], ways["after"])


@pytest.mark.slow
def test_over_fsdp():
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    ways = {}
    for way in ("before", "after"):
        ways |= run(*torchrun, str(EXAMPLES / "fsdp_loop.py"), "--loss", way)
    hold(ways["before"], ways["after"])


@pytest.mark.slow
def test_text_alone_from_an_endpoint(tmp_path, monkeypatch, capsys):
    """A teacher of other tokens, that only chats: the money runs out, and with more of it the same command ends the run."""
    monkeypatch.chdir(tmp_path)
    tokenizer = tiny_tokenizer(merges=(("o", "n"), ("a", "n"), ("an", "d"), ("e", "r")))
    backend = HFBackend(tiny_llama(vocab_size=263, seed=1), tokenizer, name="tiny")
    server = OpenAIServer(backend, encode=lambda text: tokenizer(text)["input_ids"], ways=[CHAT])
    Path("questions.jsonl").write_text("\n".join(questions(24)))
    student = save_folder(tmp_path / "student", tiny_llama(vocab_size=262), tiny_tokenizer())
    main = runpy.run_path(str(EXAMPLES / "text_only.py"))["main"]
    lengths = ["--tokens", "1600", "--prompt-tokens", "24", "--answer-tokens", "16"]
    with served(server) as port:
        asked = [
            f"openai://127.0.0.1:{port}/v1",
            "questions.jsonl",
            "--student",
            str(student),
            *lengths,
            "--lr",
            "1e-3",
            "--prices",
            "2",
            "6",
        ]
        with pytest.raises(SystemExit, match="7"):
            main([*asked, "--limit", "0.0008"])
        assert "raise teacher.budget.limit" in capsys.readouterr().err
        assert main(asked) == 0
    written = capsys.readouterr().out
    assert re.search(r"^prompt +0 the thin thing in$", written, re.MULTILINE)
    assert re.search(r"^paid: 0\.00[1-9]", written, re.MULTILINE)
    steps = [json.loads(line) for line in (tmp_path / "runs" / "text_only" / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1]["ce"] < steps[0]["ce"]
    assert all(body["messages"] for path, body in server.requests if path.endswith("chat/completions"))
