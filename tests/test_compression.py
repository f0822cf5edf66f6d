"""The compression experiment: no passage of the test is trained on, and its own configuration runs, on a very small model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

from bbopd.data.demo_text import demo_topics
from bbopd.modeling import load_model, load_tokenizer
from bbopd.teachers.hf import HFBackend
from benchmarks.comparisons import publish
from benchmarks.compression import CURVES, SHOWN, curves_of, passages, spread, write_files
from benchmarks.plots import plot_curves
from tests.serving import serving
from tests.test_compare_run import InProcess
from tests.tiny_models import save_folder, tiny_llama

CONFIGS = Path(__file__).parents[1] / "configs"


def lines(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_no_document_is_in_two_files(tmp_path: Path) -> None:
    written = write_files(tmp_path, demo_topics(), {"target": "grpc://localhost:1"})
    found = {part: lines(tmp_path / f"{part}.jsonl") for part in written}
    assert {part: len(rows) for part, rows in found.items()} == written
    assert written["test"] == 60
    documents = {part: {row["document"] for row in rows} for part, rows in found.items()}
    assert not documents["test"] & (documents["train"] | documents["development"])
    assert not documents["train"] & documents["development"]
    texts = {part: {row["prompt"] for row in rows} for part, rows in found.items()}
    assert not texts["test"] & texts["train"]


def test_passages_and_their_order_by_hand() -> None:
    text = "".join(map(str, range(10))) * 130  # 1,300 characters
    cut = passages(text, "d")
    assert [len(one["prompt"]) + len(one["response"]) for one in cut] == [600, 600]
    assert "".join(one["prompt"] + one["response"] for one in cut) == text[:1200]
    documents = [[{"p": "a1"}, {"p": "a2"}, {"p": "a3"}], [{"p": "b1"}]]
    assert [one["p"] for one in spread(documents, None)] == ["a1", "b1", "a2", "a3"]
    assert [one["p"] for one in spread(documents, 3)] == ["a1", "b1", "a2"]


@pytest.mark.filterwarnings("ignore::UserWarning:bbopd")
def test_its_configuration_runs(tmp_path: Path) -> None:
    """Two arms of a few updates: every figure of the table is there, and a curve has the tokens that were trained."""
    save_folder(tmp_path / "teacher", tiny_llama(vocab_size=262, seed=1, max_positions=1024))
    save_folder(tmp_path / "student", tiny_llama(vocab_size=262, seed=2, max_positions=1024))
    with serving(HFBackend(load_model(tmp_path / "teacher"), load_tokenizer(tmp_path / "teacher"))) as (server,):
        teacher = {"target": f"grpc://127.0.0.1:{server.port}", "signal": "full"}
        topics = {f"topic {number}": f"{number} is a number and no word. " * 25 for number in range(30)}
        write_files(tmp_path, topics, teacher)
        data = yaml.safe_load((CONFIGS / "compare_compression.yaml").read_text().replace("runs/compression/", f"{tmp_path}/"))
        data["base"]["student"]["model"] = str(tmp_path / "student")
        data["base"]["teacher"] = teacher
        data["base"]["train"] |= {"batch_tokens": 64}
        data["base"]["rollouts"] |= {"max_new_tokens": 8}
        data["base"]["eval"] = {"sequences": 2, "rollouts": 2, "max_new_tokens": 4, "every": 1}
        data["measures"]["test"] = str(tmp_path / "development.yaml")
        data |= {"budget": {"updates": 2}, "seeds": [0], "arms": {"none": {}, "off_policy": {}}}
        outcome = InProcess(data).run()
    assert outcome.failures == ()
    page = publish("benchmarks.compression", tmp_path / "compare", tmp_path / "results", SHOWN)
    assert "| `off_policy` |" in page.read_text()
    kept = list(csv.DictReader(page.with_suffix(".csv").read_text().splitlines()))
    assert {row["measure"] for row in kept} >= set(SHOWN)
    curves = curves_of(tmp_path / "compare", ["off_policy"])
    assert [row["step"] for row in curves] == [0, 2], "a cycle is trained on whole before it is looked at"
    assert curves[0]["tokens"] == 0
    assert curves[-1]["tokens"] == pytest.approx(next(float(row["student_tokens"]) for row in kept if row["arm"] == "off_policy"))
    assert curves[-1]["kl_held_out"] != curves[0]["kl_held_out"]
    plot_curves(curves, CURVES, tmp_path / "curves.svg")
    assert b"off_policy" in (tmp_path / "curves.svg").read_bytes()
