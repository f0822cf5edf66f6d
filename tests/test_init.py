"""``bbopd init``: answers become a file that the doctor passes, whatever the teacher gives; nothing is ever overwritten."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import yaml

from bbopd.cli.main import main
from bbopd.config_file import load_config
from bbopd.modeling import load_model, load_tokenizer
from bbopd.teachers.hf import HFBackend
from tests.serving import serving
from tests.tiny_models import save_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_folder(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def prompts(tmp_path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is the number {number}?"}) + "\n" for number in range(30)))
    return path


def answered(monkeypatch, *answers: object) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{answer}\n" for answer in answers)))


@pytest.mark.parametrize("signal", ["full", "sampled", "text"])
def test_answers_become_a_run_that_the_doctor_passes(signal, model, prompts, tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    monkeypatch.chdir(tmp_path)
    with serving(HFBackend(load_model(model), load_tokenizer(model), name=str(model))) as (server,):
        answered(monkeypatch, model, f"{server.target} {signal}", prompts, "4k", "cpu")
        assert main(["init", str(file)]) == 0
        assert f"next: bbopd doctor {file}" in capsys.readouterr().out
        bare = [line for line in file.read_text().splitlines() if " # " not in line and not line.rstrip().endswith(":")]
        assert not bare, "each value has its meaning beside it"
        assert main(["doctor", str(file), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {check["status"] for check in found["checks"]} <= {"pass", "skip"}, found


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("grpc://localhost:7070", {"target": "grpc://localhost:7070", "signal": "full"}),
        ("grpc://localhost:7070 topk", {"target": "grpc://localhost:7070", "signal": "topk", "topk": 64}),
        ("org/model candidates", {"serve.model": "org/model", "signal": "candidates"}),
        ("org/model sampled", {"serve.model": "org/model", "signal": "sampled"}),
        ("https://example.com/v1 large-one", {"target": "https://example.com/v1", "model": "large-one", "signal": "text"}),
        ("openai://localhost:8000/v1 topk", {"target": "openai://localhost:8000/v1", "model": None, "signal": "topk"}),
    ],
)
def test_flags_answer_for_every_level(teacher, expected, tmp_path, capsys):
    file = tmp_path / "run.yaml"
    assert main(["init", str(file), "--teacher", teacher, "--tokens", "1M", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"] == str(file)
    config = load_config(file)
    for key, value in expected.items():
        found = config.teacher
        for part in key.split("."):
            found = getattr(found, part)
        assert found == value, key
    budget = config.train.labelled_tokens if expected["signal"] == "text" else config.train.on_policy_tokens
    assert budget == 1_000_000


def test_what_is_there_is_kept(tmp_path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text("mine")
    assert main(["init", str(file), "--yes"]) == 2
    assert "is there already: name another file" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_who_answers_badly_is_asked_again(tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    answered(monkeypatch, "", "ftp://x", "org/model much", "org/model topk", "gone.jsonl", "demo", "many", "3k", "moon", "")
    assert main(["init", str(file)]) == 0
    out = capsys.readouterr().out
    for complaint in (
        "an address begins with",
        "much is nothing that a teacher can give",
        "there is no file gone.jsonl",
        "no number",
        "moon",
    ):
        assert complaint in out
    written = yaml.safe_load(file.read_text())
    assert written["train"]["on_policy_tokens"] == 3000
    assert written["student"]["device"] == "auto"


def test_answers_that_end_too_early_or_cannot_be_used_leave_no_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "run.yaml"
    answered(monkeypatch, "org/student")
    assert main(["init", str(file)]) == 2
    assert "the answers end before teacher" in capsys.readouterr().err
    assert main(["init", str(file), "--yes", "--tokens", "-3"]) == 2
    assert not file.exists()
