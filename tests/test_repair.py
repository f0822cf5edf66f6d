"""The repair experiment: no question of the test is trained on, and its own configuration runs, on a model of a few thousand numbers."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from bbopd.modeling import load_model, load_tokenizer
from bbopd.teachers.hf import HFBackend
from benchmarks.comparisons import publish
from benchmarks.objective_models import short_questions
from benchmarks.repair import HELD_OUT, SHOWN, SIZES, is_held_out, write_files
from tests.serving import serving
from tests.test_compare_run import InProcess
from tests.tiny_models import save_folder, tiny_llama

QUESTIONS = [(question, "It is a thing.") for question in short_questions()]
CONFIGS = Path(__file__).parents[1] / "configs"


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_is_tested_is_not_trained_on(tmp_path: Path) -> None:
    write_files(tmp_path, QUESTIONS, {"target": "grpc://localhost:1"}, {**SIZES, "narrow": 500})
    asked = {str(line["prompt"]) for line in lines(tmp_path / "forgotten.jsonl")}
    assert len(asked) == 5 * len(HELD_OUT)
    trained = [line["messages"][0]["content"] for line in lines(tmp_path / "general.jsonl")]  # type: ignore[index]
    assert len(trained) + len(asked) == len(QUESTIONS)
    assert not asked & set(trained)
    assert not any(is_held_out(question) for question in trained)
    assert is_held_out("What is a bridge?")
    assert not is_held_out("What is a bridgehead?")
    sums = {str(line["prompt"]) for line in lines(tmp_path / "skill.jsonl")}
    assert len(sums) == SIZES["skill"]
    assert not sums & {line["prompt"] for line in lines(tmp_path / "narrow.jsonl")}


@pytest.mark.filterwarnings("ignore::UserWarning:bbopd")
def test_its_configuration_runs(tmp_path: Path) -> None:
    """Damaged and repaired by two updates: every figure of the table is there, and nothing has been won back by doing nothing."""
    save_folder(tmp_path / "teacher", tiny_llama(vocab_size=262, seed=1, max_positions=512))
    save_folder(tmp_path / "narrow", tiny_llama(vocab_size=262, seed=2, max_positions=512))
    with serving(HFBackend(load_model(tmp_path / "teacher"), load_tokenizer(tmp_path / "teacher"))) as (server,):
        teacher = {"target": f"grpc://127.0.0.1:{server.port}", "signal": "full"}
        write_files(tmp_path, QUESTIONS[::8], teacher, {"narrow": 10, "skill": 8, "prose": 2})
        data = yaml.safe_load((CONFIGS / "compare_repair.yaml").read_text().replace("runs/repair/", f"{tmp_path}/"))
        data["base"]["student"]["model"] = str(tmp_path / "narrow")
        data["base"]["teacher"] = teacher
        data |= {"budget": {"updates": 2}, "arms": {name: data["arms"][name] or {} for name in ("none", "on_policy")}}
        outcome = InProcess(data).run()
    assert outcome.failures == ()
    rows = {row.name: row for row in outcome.rows}
    assert list(rows) == ["none", "on_policy", "before"]
    for row in rows.values():
        assert {"kl_held_out", "kl_rollouts", "bits_per_byte", "skill.exact_match", "prose.bits_per_byte"} <= set(row.tested)
    assert rows["before"].tested["kl_held_out"].value == pytest.approx(0.0, abs=1e-3), "float16 on the wire"
    assert rows["none"].tested["kl_held_out"].value > 0.1
    assert rows["on_policy"].tested["kl_held_out"].value < rows["none"].tested["kl_held_out"].value
    assert rows["on_policy"].spent["updates"] == 2
    page = publish("benchmarks.repair", tmp_path / "compare", tmp_path / "results", SHOWN).read_text().splitlines()
    assert [line.split(" | ")[0] for line in page[2:5]] == ["| `none`", "| `on_policy`", "| `before`"]
    left = rows["on_policy"].tested["kl_held_out"]
    assert page[3].split(" | ")[1] == f"{left.value:.3f} ({left.low:.3f} to {left.high:.3f})"
    assert f"{rows['on_policy'].spent['student_tokens']:,.0f}" in page[3]
    (csv_file,) = (tmp_path / "results").glob("*/repair.csv")
    kept = list(csv.DictReader(csv_file.read_text().splitlines()))
    assert len(kept) == sum(len(row.tested) for row in rows.values())
