"""``bbopd objectives``: the table of them, alone and marked for a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from bbopd.cli.main import main
from bbopd.modeling import vocabulary_sha256
from bbopd.objectives import OBJECTIVES
from bbopd.rpc.answers import answer_bytes
from bbopd.teachers.fake import FakeBackend
from bbopd.types import DIVERGENCES, Prompt, Rollout, SignalSpec
from tests.serving import serving
from tests.tiny_models import save_folder, tiny_tokenizer


def table(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, dict[str, Any]]:
    assert main(["objectives", "--json", *map(str, arguments)]) == 0
    return {row["name"]: row for row in json.loads(capsys.readouterr().out)["objectives"]}


def test_every_objective_is_there_with_what_it_costs(capsys):
    rows = table(capsys, "--vocab", 128_000, "--topk", 32)
    assert set(rows) == set(OBJECTIVES)
    assert all(row["computes"] and row["source"] and row["teacher_work"] and row["student_work"] for row in rows.values())
    one = Rollout("one", Prompt("one", (0,)), (0,))
    topk = answer_bytes(one, SignalSpec("topk", top_k=32), 128_000)
    assert rows["jsd"]["bytes_per_token"] == {"full": 256_000, "candidates": 72, "topk": topk}
    assert rows["policy_gradient"]["bytes_per_token"]["sampled"] == 4
    assert rows["sft"]["bytes_per_token"] == {}
    assert "fits" not in rows["jsd"]


def test_what_a_teacher_can_serve_is_marked(capsys):
    with serving(FakeBackend(50, levels=("sampled", "text"))) as (server,):
        rows = table(capsys, "--teacher", server.target)
        assert {name for name, row in rows.items() if row["fits"]} == {"policy_gradient", "sft", "seqkd", "verbal", "gad"}
        assert rows["policy_gradient"]["signals"] == ["sampled"]
        assert main(["objectives", "--teacher", server.target]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("teacher fake-50-0 offers sampled, text; whether its tokens are the student's is not known here")
    assert "policy_gradient  [fits, with sampled]" in lines
    assert "forward_kl  [does not fit]" in lines


def test_a_run_names_the_student_too(tmp_path, capsys):
    tokenizer = tiny_tokenizer()
    save_folder(tmp_path / "student", tokenizer=tokenizer)
    same, other = vocabulary_sha256(tokenizer, len(tokenizer)), "0" * 64
    file = tmp_path / "run.yaml"
    for digest in (same, other):
        with serving(FakeBackend(len(tokenizer), vocab_sha256=digest)) as (server,):
            run = {"student": {"model": str(tmp_path / "student")}, "teacher": {"target": server.target}, "objective": {"temperature": 1.0}}
            file.write_text(yaml.safe_dump(run))
            rows = table(capsys, file, "--set", "teacher.topk=8")
            assert main(["objectives", str(file)]) == 0
        fitting = {name for name, row in rows.items() if row["fits"]}
        assert fitting == (set(OBJECTIVES) if digest == same else {"sft", "seqkd", "verbal", "gad", "aligned"})
        assert rows["forward_kl"]["bytes_per_token"]["full"] == 2 * len(tokenizer)
        assert rows["forward_kl"]["bytes_per_token"]["topk"] == 8 * 4 + 8
        printed = capsys.readouterr().out
        assert f"forward_kl  [the run's; {'fits, with full or topk' if digest == same else 'does not fit'}]" in printed


def test_a_teacher_to_be_started_is_known_from_its_settings(tmp_path: Path, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"student": {"model": "x"}, "teacher": {"serve": {"model": "y", "engine": "vllm"}, "topk": 4}}))
    rows = table(capsys, file, "--set", "objective.temperature=1")
    assert rows["forward_kl"]["signals"] == ["topk"]
    assert not rows["reverse_kl"]["fits"]
    assert all(rows[name]["needs"][0] == "full" for name in DIVERGENCES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--teacher", "https://api.example.com/v1"], "goes into a run's file"),
        (["--set", "train.lr=1"], "--set lays values over a run's file"),
        (["--vocab", "-1"], "--vocab -1 and --topk 64: give positive numbers"),
        (["--teacher", "grpc://localhost:1", "--connect-timeout", "0.3"], "localhost:1"),
    ],
)
def test_what_cannot_be_told_is_an_error(arguments, message, capsys):
    assert main(["objectives", *arguments]) in (2, 3)
    assert message in capsys.readouterr().err
