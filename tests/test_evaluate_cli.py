"""``bbopd eval`` on model folders: its figures against hand-made ones, and what it says when it cannot measure."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from bbopd.cli import eval as command
from bbopd.config import ServeConfig
from bbopd.errors import ConfigError, DataError, TeacherError
from bbopd.teachers.hf import HFBackend
from tests.serving import serving
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.waiting import unused_port

TEXT = ["The naïve thing: 日本語 in the café, and then the end of it all. " * 3, "Another document begins here 🙂, and it ends there. " * 4]
SIZES = ["--sequences", "4", "--rollouts", "3", "--max-new-tokens", "8", "--dtype", "float32"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {
        "student": save_folder(root / "student", tiny_llama(seed=1, max_positions=2048)),
        "teacher": save_folder(root / "teacher", tiny_llama(seed=2, max_positions=2048)),
        "other": save_folder(root / "other", tiny_llama(vocab_size=400, max_positions=2048), tiny_tokenizer((("o", "u"),))),
    }


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("\n\n\n".join(TEXT), encoding="utf-8")
    return path


def evaluate(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(argument) for argument in arguments]))


def as_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert evaluate(*arguments, *SIZES, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_whole_documents_in_windows(models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One window holds each document: its likelihood is a single forward pass of the dense model, over its tokens without padding."""
    result = as_json(capsys, models["student"], "--text", text, "--window", 1024)
    model, tokenizer = tiny_llama(seed=1, max_positions=2048), tiny_tokenizer()
    nats, size = 0.0, 0
    for document in TEXT:
        ids = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(document.strip(), add_special_tokens=False)])
        with torch.no_grad():
            logprobs = model(input_ids=ids[None]).logits[0, :-1, : len(tokenizer)].double().log_softmax(-1)
        nats -= float(logprobs.gather(1, ids[1:, None]).sum())
        size += len(document.strip().encode())
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert result["sequences"] == {"held_out": 2}
    assert result["kl_rollouts"] is None


def test_agreement_with_a_model_loaded_here(models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    against_teacher = as_json(capsys, models["student"], "--text", text, "--teacher-model", models["teacher"])
    against_itself = as_json(capsys, models["student"], "--text", text, "--teacher-model", models["student"])
    assert against_itself["kl_rollouts"] < 1e-3 < 0.1 < against_teacher["kl_rollouts"]
    assert against_itself["top1_held_out"] == 1.0
    assert against_teacher["bits_per_byte"] == pytest.approx(against_itself["bits_per_byte"])
    assert against_teacher["teacher"] == str(models["teacher"])
    assert against_teacher["sequences"]["rollouts"] == 3


def test_table_shows_the_figures_of_the_json(models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = (models["student"], "--text", text)
    result = as_json(capsys, *arguments)
    assert evaluate(*arguments, *SIZES) == 0
    shown = capsys.readouterr().out
    assert f"{result['bits_per_byte']:.3f}" in shown
    assert "Bits per byte" in shown
    assert f"{result['tokens']['held_out']} tokens" in " ".join(shown.split())


def test_held_out_part_of_a_runs_own_data(models: dict[str, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"student: {{model: {models['student']}}}\n"
        "objective: {name: sft}\n"
        "rollouts: {on_policy_fraction: 0.0, max_new_tokens: 8}\n"
        "train: {labelled_tokens: 100, max_seq_len: 256}\n"
        f"data: {{prompts: [{{text: {text}}}], held_out: 0.5, prompt_tokens: 8, response_tokens: 16}}\n"
        "eval: {sequences: 3}\n",
        encoding="utf-8",
    )
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    assert command.run(parser.parse_args([str(models["student"]), "--config", str(config), "--dtype", "float32", "--json"])) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["sequences"] == {"held_out": 3}, "the run's own number"
    assert whole["tokens"]["held_out"] <= 3 * 16
    shorter = as_json(capsys, models["student"], "--config", config, "--set", "data.response_tokens=4")
    assert shorter["tokens"]["held_out"] == 4 * 4


def test_what_cannot_be_measured_is_said(models: dict[str, Path], text: Path, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match=r"vocabulary of 260 entries, the student of 320.* 259 is 'ou' there and 'th' here"):
        evaluate(models["student"], "--text", text, "--teacher-model", models["other"], *SIZES)
    with pytest.raises(ConfigError, match="--config"):
        evaluate(models["student"], "--text", text, "--set", "eval.sequences=3")
    with pytest.raises(DataError, match="nowhere"):
        evaluate(models["student"], "--text", tmp_path / "nowhere.txt", *SIZES)
    with pytest.raises(ConfigError, match="context"):
        evaluate(models["student"], "--text", text, "--window", 1, *SIZES)
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"prompt": "Why?", "response": "Because."}\n', encoding="utf-8")
    with pytest.raises(DataError, match="running text"):
        evaluate(models["student"], "--text", questions, "--window", 8, *SIZES)


def test_agreement_with_replicas_of_a_served_teacher(models: dict[str, Path], text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loaded = as_json(capsys, models["student"], "--text", text, "--teacher-model", models["teacher"])
    with serving(HFBackend.from_config(ServeConfig(model=str(models["teacher"]), dtype="float32")), 2) as servers:
        targets = [argument for server in servers for argument in ("--teacher", server.target)]
        served = as_json(capsys, models["student"], "--text", text, *targets)
        unused = unused_port()
        with pytest.raises(TeacherError, match=str(unused)):  # every address that is given counts
            evaluate(models["student"], "--text", text, *targets, "--teacher", f"grpc://127.0.0.1:{unused}", "--connect-timeout", 3, *SIZES)
    assert served["kl_rollouts"] == pytest.approx(loaded["kl_rollouts"], rel=1e-2)


def test_teacher_that_is_not_there(models: dict[str, Path], text: Path) -> None:
    port = unused_port()
    with pytest.raises(TeacherError, match=str(port)):
        evaluate(models["student"], "--text", text, "--teacher", f"grpc://127.0.0.1:{port}", "--connect-timeout", 0.5, *SIZES)


@pytest.mark.parametrize(
    "arguments", [["model"], ["model", "--text", "demo", "--config", "x"], ["model", "--text", "demo", "--rollouts", "0"]]
)
def test_arguments_that_do_not_fit(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate(*arguments)
    assert "error" in capsys.readouterr().err
