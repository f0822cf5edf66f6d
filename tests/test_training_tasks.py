"""Tasks of a run: asked of the student at every evaluation, in its files, and the best student kept by one of their metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from bbopd.cli.execute import execute
from bbopd.config_file import load_config
from bbopd.errors import ConfigError
from bbopd.report.load import load_run
from bbopd.report.table import plain_lines
from tests.test_tasks import write_task
from tests.tiny_models import save_folder, tiny_llama

PROSE = "the thing in the inn is the thin one, and that is the thing. "


def run_file(folder: Path, **evaluation: object) -> Path:
    save_folder(folder / "model", tiny_llama(seed=4))
    (folder / "corpus.txt").write_text("\n\n\n".join(PROSE * 3 + str(number) for number in range(20)))
    path = folder / "run.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "student": {"model": str(folder / "model")},
                "objective": {"name": "sft"},
                "rollouts": {"on_policy_fraction": 0.0, "max_new_tokens": 8},
                "train": {"labelled_tokens": 384, "batch_tokens": 64, "max_seq_len": 64, "lr": 1e-2, "checkpoint_every": 50},
                "data": {"prompts": [{"text": str(folder / "corpus.txt")}], "prompt_tokens": 8, "response_tokens": 16},
                "eval": {"every": 3, "sequences": 2, **evaluation},
                "output": str(folder / "run"),
            }
        )
    )
    return path


def test_a_run_asks_its_tasks_and_keeps_the_best(tmp_path: Path) -> None:
    choices = write_task(
        tmp_path,
        [{"q": f"{n} is", "o": [f"the {n}", f"zz{n}"], "a": 0} for n in range(6)],
        task="choices",
        prompt="q",
        choices="o",
        answer="{{a}}",
    )
    (tmp_path / "prose.jsonl").write_text(json.dumps({"text": PROSE}))
    config = run_file(tmp_path, tasks=[choices, str(tmp_path / "prose.jsonl")], keep_best="prose.bits_per_byte")
    assert execute(load_config(config), plain=True) == 0
    lines = load_run(tmp_path / "run").evals
    found = [line["prose.bits_per_byte"] for line in lines]
    stages = [line["stage"] for line in lines]
    assert (stages[0], stages[1], stages[-1]) == ("start", "step", "end")
    assert found[-1] < found[0] - 0.3, "the prose is what it is trained on"
    assert all(0 <= line["choices.acc"] <= 1 for line in lines)
    assert "choices.acc" in lines[0]["standard_errors"]
    assert lines[0]["lower_is_better"] == ["prose.bits_per_byte", "prose.perplexity"]
    about = json.loads((tmp_path / "run" / "best" / "evaluation.json").read_text())
    assert about["value"] == min(found)
    shown = "\n".join(plain_lines(tmp_path / "run"))
    assert f"prose: bits_per_byte: {found[0]:.3f} -> {found[-1]:.3f}" in shown


def test_tasks_are_read_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "qa.jsonl").write_text('{"prompt": "p", "answer": "a"}\n')
    names = [str(tmp_path / "qa.jsonl")]
    for evaluation, said in (
        ({"tasks": [str(tmp_path / "gone.yaml")]}, "cannot read task .*gone.yaml"),
        ({"tasks": names, "keep_best": "other.f1"}, "keep_best is other.f1, but the tasks are qa"),
    ):
        with pytest.raises(ConfigError, match=said):
            execute(load_config(run_file(tmp_path, **evaluation)), plain=True)
        assert not (tmp_path / "run").exists()
