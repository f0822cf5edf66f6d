"""A whole run of a student that teaches itself, in few bits, taken up again from the middle."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from bbopd.cli.main import main
from bbopd.trainer import latest_checkpoint, load_beside
from tests.cli_runs import losses, measures, steps
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("as_in_a_process_of_its_own")


def write_config(folder: Path, **sections) -> Path:
    if not (folder / "base").exists():
        save_folder(folder / "base", tiny_llama(vocab_size=262, hidden=64), tiny_tokenizer())
        rows = ({"prompt": f"what is {n} and {n}? ", "response": f"it is {2 * n}"} for n in range(30))
        (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = {
        "student": {"model": str(folder / "base"), "dtype": "float32"},
        "teacher": {"self": {"context": "{reference}. {prompt}"}},
        "objective": {"name": "reverse_kl", "temperature": 1.0, "ramp": 0},
        "rollouts": {"per_update": 4, "max_new_tokens": 8, "max_staleness": 0, "on_policy_fraction": 1.0},
        "train": {"batch_tokens": 32, "max_seq_len": 64, "lr": 1e-2, "on_policy_tokens": 120, "checkpoint_every": 1, "keep_checkpoints": 9},
        "data": {
            "prompts": [{"jsonl": str(folder / "rows.jsonl")}],
            "prompt_tokens": 8,
            "response_tokens": 8,
            "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 3, "rollouts": 3, "max_new_tokens": 8},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        config[name] = {**config[name], **values} if isinstance(values, dict) else values
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_an_averaged_student_in_few_bits_teaches_and_goes_on_exactly(tmp_path):
    options = {
        "student": {"model": str(tmp_path / "base"), "dtype": "float32", "lora": {"rank": 4}, "quantize": "nf4"},
        "teacher": {"self": {"context": "{reference}. {prompt}", "weights": "ema", "ema_decay": 0.9}},
    }
    config = write_config(tmp_path, **options)
    assert main(["distill", str(config), "--plain"]) == 0
    run, whole = tmp_path / "run", tmp_path / "whole"
    taught = steps(run)
    assert len(taught) >= 3
    assert all(line["kd"] > 0 and line["grad_norm"] > 0 for line in taught), "with the answer in sight it thinks otherwise"
    run.rename(whole)
    shutil.copytree(whole, run)
    checkpoints = sorted((run / "checkpoints").glob("step-*"))
    for path in checkpoints[1:]:
        shutil.rmtree(path)
    (run / "checkpoints" / "latest").write_text(checkpoints[0].name + "\n")
    (run / "summary.json").unlink()  # as if it had been killed then
    assert main(["distill", str(config), "--plain"]) == 0
    assert losses(run) == losses(whole)
    assert measures(run) == measures(whole)
    found, expected = (load_beside(latest_checkpoint(folder / "checkpoints"))["average"] for folder in (run, whole))
    assert all("lora_" in name for name in expected)
    assert all(bool((found[name] == value).all()) for name, value in expected.items())


def test_own_weights_teach_and_the_doctor_looks_at_what_they_read(tmp_path, capsys):
    config = write_config(tmp_path, train={"batch_tokens": 32, "max_seq_len": 64, "on_policy_tokens": 40, "optimizer": "adamw_8bit"})
    assert main(["doctor", str(config)]) == 0
    assert "the student's own weights, which read up to" in " ".join(capsys.readouterr().out.split())
    assert main(["distill", str(config), "--plain"]) == 0
    assert all(line["kd"] > 0 for line in steps(tmp_path / "run"))
    config = write_config(tmp_path, output=str(tmp_path / "other"), teacher={"self": {"context": "{prompt}", "weights": "student"}})
    assert main(["distill", str(config), "--plain"]) == 0
    first, *_ = steps(tmp_path / "other")
    assert first["kd"] == pytest.approx(0.0, abs=1e-4), "without a hint it agrees with itself"
