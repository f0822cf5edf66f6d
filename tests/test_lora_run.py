"""A whole run that trains adapters, killed and gone on with, and what it leaves for the next stage."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bbopd.cli.main import main
from bbopd.modeling import load_model
from tests.cli_runs import environment, losses, measures, serving, steps, write_config
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

LORA = {"rank": 4, "alpha": 16, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"]}


@pytest.fixture
def base(tmp_path) -> Path:
    return save_folder(tmp_path / "base", tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())


def _run_twice(folder: Path, base: Path, text: Path, options: dict[str, Any]) -> tuple[Path, Path]:
    """The folder of a run, and that of the same one killed on its way and gone on with."""
    (folder / "a").mkdir()
    (folder / "b").mkdir()
    assert main(["distill", str(write_config(folder / "a", base, text, **options))]) == 0
    whole = folder / "a" / "run"
    first, *_, last = steps(whole)
    assert last["loss"] < first["loss"]

    config, run = write_config(folder / "b", base, text, **options), folder / "b" / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "bbopd", "distill", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment()
    )
    deadline = time.monotonic() + 300
    while len(steps(run)) < 4 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(steps(run)) >= 4, process.stderr.read().decode() if process.poll() is not None else "still loading"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    assert not (checkpoint / "model" / "model.safetensors").exists()
    assert main(["distill", str(config)]) == 0
    assert losses(run) == losses(whole)
    assert measures(run) == measures(whole)
    return whole, run


@pytest.mark.slow
@pytest.mark.timeout(900)  # three runs, each with a teacher in a process of its own
@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_a_run_that_was_killed_leaves_the_model_of_an_uninterrupted_one(text, base, tmp_path):
    options = {
        "student": {"lora": LORA, "activation_checkpointing": True},
        "train": {"lr": 1e-2, "cold_start_tokens": 100, "on_policy_tokens": 200},
    }
    with serving(base, tmp_path) as teacher:
        whole, run = _run_twice(tmp_path, base, text, {**options, "teacher": teacher})
    student, twin = load_model(run / "model"), load_model(whole / "model")
    adapter = load_model(run / "adapter", keep_layers=[0, 3])
    before = dict(load_model(base, keep_layers=[0, 3]).named_parameters())
    for name, value in student.named_parameters():
        assert torch.equal(value, twin.get_parameter(name)), name
        torch.testing.assert_close(adapter.get_parameter(name), value, rtol=1e-6, atol=1e-6, msg=name)
        is_trained = any(target in name for target in LORA["target_modules"])
        assert torch.equal(value, before[name]) != is_trained, name
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)


@pytest.mark.usefixtures("as_in_a_process_of_its_own")
def test_settings_that_do_not_fit_end_the_command_with_what_does(text, base, tmp_path, capsys):
    config = write_config(tmp_path, base, text, student={"lora": {"target_modules": ["query"]}})
    for words, expected in (
        ([], "'query', which is no linear layer in the body of LlamaForCausalLM: it has down_proj, gate_proj, k_proj, o_proj, q_proj"),
        (["--set", "student.lora.rank=0"], "student.lora.rank"),
    ):
        assert main(["distill", str(config), *words]) == 2
        assert expected in " ".join(capsys.readouterr().err.split())
