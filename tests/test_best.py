"""The best student so far: kept by the measure that was asked for, in its own direction, whole at any moment."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from bbopd.config import EvalConfig
from bbopd.errors import CheckpointError, ConfigError
from bbopd.pipeline.best import BestModel


def line(step: int, **figures) -> dict:
    return {"stage": "step", "step": step, "seconds": 1.0, **figures}


@pytest.mark.parametrize(("measure", "values", "kept"), [("win_rate", [0.2, 0.6, 0.5], 2), ("bits_per_byte", [1.0, 0.8, 0.9], 2)])
def test_the_best_by_its_measure_is_kept_and_known_again(tmp_path, measure, values, kept):
    written: list[int] = []

    def save_step(step: int):
        def save(folder):
            folder.mkdir()
            (folder / "weights").write_text(str(step))
            written.append(step)

        return save

    for step, value in enumerate(values, start=1):  # a new one each time, as after an interruption
        better = BestModel(tmp_path, measure, save_step(step)).offer(line(step, **{measure: value}))
        assert better == (step in (1, 2))
    assert written == [1, 2]
    assert (tmp_path / "best" / "weights").read_text() == str(kept)
    about = json.loads((tmp_path / "best" / "evaluation.json").read_text())
    assert about == {"measure": measure, "value": values[kept - 1], "stage": "step", "step": kept}
    assert [path.name for path in tmp_path.iterdir()] == ["best"]


def test_a_measure_that_is_not_told_and_a_disk_that_refuses(tmp_path):
    with pytest.raises(ConfigError, match=r"keep_best is win_rate, which.*one of bits_per_byte"):
        BestModel(tmp_path, "win_rate", lambda folder: None).offer(line(1, bits_per_byte=1.0, win_rate=None))

    def fail(folder):
        raise OSError("no space left")

    with pytest.raises(CheckpointError, match="no space left"):
        BestModel(tmp_path, "bits_per_byte", fail).offer(line(1, bits_per_byte=1.0))


def test_a_tasks_metric_has_its_own_direction(tmp_path):
    def offer(measure: str, value: float, step: int) -> bool:
        best = BestModel(tmp_path / measure, measure, lambda folder: folder.mkdir(parents=True))
        return best.offer(line(step, **{measure: value}, lower_is_better=["prose.bits_per_byte"]))

    assert [offer("qa.f1", value, step) for step, value in enumerate((0.2, 0.1, 0.3))] == [True, False, True]
    assert [offer("prose.bits_per_byte", value, step) for step, value in enumerate((2.0, 2.5, 1.5))] == [True, False, True]
    assert EvalConfig(tasks=("qa.yaml",), keep_best="qa.f1").keep_best == "qa.f1"
    for known in ({}, {"tasks": ("qa.yaml",)}):
        with pytest.raises(ValidationError, match="keep_best f1 is no measure: take one of bits_per_byte"):
            EvalConfig(keep_best="f1", **known)


def test_a_judge_is_a_running_teacher_that_replies():
    assert EvalConfig(judge={"target": "openai://localhost:1/v1"}, keep_best="win_rate").judge.signal == "text"
    with pytest.raises(ValidationError, match=r"needs a judge: give judge.target"):
        EvalConfig(keep_best="win_rate")
    with pytest.raises(ValidationError, match="a running teacher that replies in words"):
        EvalConfig(judge={"target": "grpc://localhost:1", "signal": "full"})
