"""A whole run of adversarial distillation from an endpoint that gives text alone: its figures, its books, killed and gone on with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bbopd.cli.execute import execute
from bbopd.cli.main import main
from bbopd.config import RunConfig
from bbopd.rpc.server import start_server
from bbopd.teachers.hf import HFBackend
from bbopd.trainer import latest_checkpoint, load_beside
from tests.openai_runs import run_config, served
from tests.openai_server import CHAT, OpenAIServer
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)

GAD = {
    "teacher": {"signal": "text", "answers": {"max_new_tokens": 12}},
    "objective": {"name": "gad", "temperature": 0.8, "gad": {"discriminator_lr": 1e-3, "length_alarm": 0.0}},
    "rollouts": {"per_update": 8, "samples_per_prompt": 4, "max_new_tokens": 10, "temperature": 0.8, "max_staleness": 0},
    "train": {"batch_tokens": 40, "max_seq_len": 48, "cold_start_tokens": 150, "on_policy_tokens": 320, "lr": 1e-3, "checkpoint_every": 1},
}


def teacher() -> OpenAIServer:
    """One of another tokenizer and other weights."""
    other = tiny_tokenizer(merges=(("o", "n"), ("a", "n"), ("an", "d"), ("e", "r")))
    backend = HFBackend(tiny_llama(vocab_size=263, seed=1), other, name="tiny")
    return OpenAIServer(backend, encode=lambda text: other(text)["input_ids"], ways=[CHAT])


def configure(folder: Path, port: int, output: Path, **sections: Any) -> Path:
    sections = {name: {**GAD.get(name, {}), **sections.get(name, {})} for name in {*GAD, *sections}}
    config: RunConfig = run_config(folder, port, **sections)
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**config.model_dump(mode="json"), "output": str(output)}))
    return path


def lines_of(run: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run / name
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def start(config: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bbopd", "distill", str(config), "--plain"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def kill_after(config: Path, run: Path, lines: int) -> None:
    process = start(config)
    deadline = time.monotonic() + 200
    while len(lines_of(run)) < lines and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGKILL)
    process.communicate()


def repeatable(run: Path) -> list[dict[str, Any]]:
    """What must be the same however often a run was interrupted."""
    kept = ("step", "phase", "loss", "ce", "kd", "reference_kl", "reward_mean", "student_length_mean", "length_drift")
    return [{name: value for name, value in line.items() if name in kept or name.startswith("discriminator_")} for line in lines_of(run)]


@pytest.mark.slow
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_a_run_plays_the_game_and_goes_on_with_it_where_it_was_killed(tmp_path, capsys):
    server = teacher()
    with served(server) as port:
        whole = configure(tmp_path, port, tmp_path / "whole")
        assert main(["distill", str(whole), "--plain"]) == 0
        output = capsys.readouterr().out
        cut = configure(tmp_path, port, tmp_path / "cut")
        steps = lines_of(tmp_path / "whole")
        warm_up = [line for line in steps if line["phase"] == "cold_start"]
        kill_after(cut, tmp_path / "cut", 1)
        kill_after(cut, tmp_path / "cut", len(warm_up) + 2)
        assert main(["distill", str(cut), "--plain"]) == 0
    assert repeatable(tmp_path / "cut") == repeatable(tmp_path / "whole")

    game = steps[len(warm_up) :]
    assert {line["phase"] for line in game} == {"on_policy"}
    assert warm_up
    assert game
    for line in steps:
        assert 0 <= line["discriminator_accuracy"] <= 1
        assert line["discriminator_loss"] > 0
        assert line["length_drift"] == pytest.approx(line["student_length_mean"] / line["teacher_length_mean"] - 1)
    assert all(line["kd"] == 0 and line["ce"] > 0 for line in warm_up), "the student learns the teacher's words"
    assert all(line["ce"] == 0 and line["kd"] != 0 for line in game), "and then plays"
    assert all("reward_mean" in line for line in game)
    assert any(-1 <= line.get("reward_length_correlation", -2) <= 1 for line in game)
    assert game[0]["reference_kl"] == pytest.approx(0.0, abs=1e-6), "it begins where the warm-up ended"
    assert game[-1]["reference_kl"] > 1e-6
    assert any(line["length_alarm"] for line in game)
    assert "times the tokens of the teacher's" in output

    checkpoint = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    beside = load_beside(checkpoint)
    assert set(beside) == {"discriminator", "reference"}
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["sequences"]["drawn"] == summary["sequences"]["trained"] + sum(summary["rejected"].values())
    assert summary["status"] == "finished"
    asked = [body["messages"][-1]["content"] for path, body in server.requests if path.endswith("chat/completions")]
    assert len(asked) >= 2 * summary["teacher_cache"]["misses"] > 0


class TextServer:
    """The student's own tokens behind gRPC, and text alone."""

    @asynccontextmanager
    async def serving(self, port: int = 0):
        server = await start_server(HFBackend(tiny_llama(vocab_size=262, seed=1), tiny_tokenizer(), levels=("text",)), port=port)
        try:
            yield server.port
        finally:
            await server.stop(0)


def test_a_frozen_discriminator_stays_as_the_warm_up_left_it(tmp_path, capsys):
    """And a teacher that offers nothing but text can be one of the student's own tokens."""
    run = tmp_path / "run"
    with served(TextServer()) as port:
        teacher = {**GAD["teacher"], "target": f"grpc://127.0.0.1:{port}", "prices": None}
        objective = {**GAD["objective"], "gad": {"discriminator_lr": 1e-3, "frozen": True}}
        train = {**GAD["train"], "on_policy_tokens": 120, "keep_checkpoints": 100}
        assert execute(run_config(tmp_path, port, **{**GAD, "teacher": teacher, "objective": objective, "train": train}), plain=True) == 0
    assert "gives neither full nor topk: how far they agree is not measured" in capsys.readouterr().out
    steps = lines_of(run)
    assert {(line["phase"], "discriminator_grad_norm" in line) for line in steps} == {("cold_start", True), ("on_policy", False)}
    assert all(line["discriminator_loss"] > 0 for line in steps)
    end_of_warm_up = max(line["step"] for line in steps if line["phase"] == "cold_start")
    kept = {int(folder.name.removeprefix("step-")): folder for folder in (run / "checkpoints").glob("step-*")}
    before, last = (load_beside(kept[step])["discriminator"] for step in (end_of_warm_up, max(kept)))
    assert end_of_warm_up < max(kept)
    assert all(torch.equal(tensor, last[name]) for name, tensor in before.items())
    assert any(name.startswith("moments/") and bool(tensor.any()) for name, tensor in before.items()), "in the warm-up it learned"
    evals = lines_of(run, "evals.jsonl")
    assert all(line["kl_held_out"] is None and line["bits_per_byte"] > 0 and 0 <= line["discriminator_accuracy"] <= 1 for line in evals)


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_a_student_with_adapters_plays_for_the_memory_of_its_adapters(tmp_path):
    with served(teacher()) as port:
        lora = {"rank": 4, "target_modules": ["q_proj", "down_proj"]}
        train = {**GAD["train"], "cold_start_tokens": 40, "on_policy_tokens": 80}
        assert main(["distill", str(configure(tmp_path, port, tmp_path / "run", student={"lora": lora}, train=train)), "--plain"]) == 0
    game = [line for line in lines_of(tmp_path / "run") if line["phase"] == "on_policy"]
    assert game[0]["reference_kl"] == pytest.approx(0.0, abs=1e-6), "it begins where the warm-up ended"
    assert game[-1]["reference_kl"] > 1e-6
    assert all(line["discriminator_grad_norm"] > 0 for line in game)
    beside = load_beside(latest_checkpoint(tmp_path / "run" / "checkpoints"))
    names = {name.removeprefix("weights/body.") for name in beside["discriminator"] if name.startswith("weights/")}
    assert names == {"weights/head.weight"} | {name.removeprefix("model.") for name in beside["reference"]}
    assert all("lora_" in name for name in beside["reference"])
