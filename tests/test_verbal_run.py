"""Whole runs whose teacher only grades, over HTTP: they learn what is graded, pay for no grade twice, and survive replies that are none."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from bbopd.cli.execute import execute
from bbopd.config import ObjectiveConfig, RunConfig, TeacherConfig
from bbopd.doctor.examine import examine_run
from bbopd.doctor.findings import Finding
from bbopd.errors import BudgetSpentError, ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.teachers.hf import HFBackend
from bbopd.types import Offer, SignalSpec, TeacherInfo
from tests.openai_runs import run_config, served
from tests.openai_server import OpenAIServer
from tests.test_budget import nanos
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)
RUBRIC = {"criteria": [{"text": "How many letters e are in it?"}], "scale": [0, 10]}


def answer_in(messages: list[dict[str, str]]) -> str:
    return messages[0]["content"].split("<answer>\n")[1].split("\n</answer>")[0]


def letters(messages: list[dict[str, str]]) -> str:
    return f"score: {min(10, answer_in(messages).count('e'))}"


def grader(grade=letters) -> OpenAIServer:
    return OpenAIServer(HFBackend(tiny_llama(vocab_size=262, seed=1), tiny_tokenizer(), name="tiny"), ways=(), grade=grade)


def config(folder: Path, port: int, *, grading=RUBRIC, teacher=None, **sections) -> RunConfig:
    base = {
        "teacher": {"signal": "text", "grading": grading, "answers": {"max_new_tokens": 16, "top_k": 1}, "timeout": 60, **(teacher or {})},
        "objective": {"name": "verbal", "alpha": 0.0, "ramp": 0, "temperature": 1.0},
        "rollouts": {"per_update": 8, "samples_per_prompt": 4, "max_new_tokens": 10, "max_staleness": 0, "on_policy_fraction": 1.0},
        "train": {"batch_tokens": 40, "max_seq_len": 48, "on_policy_tokens": 300, "checkpoint_every": 1, "lr": 1e-3, "warmup": 0},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return run_config(folder, port, **base)


def steps_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_learns_what_is_graded(tmp_path: Path) -> None:
    server = grader()
    train = {"batch_tokens": 10_000, "on_policy_tokens": 10_000_000, "total_steps": 25, "lr": 1e-2, "checkpoint_every": 100}
    with served(server) as port:
        settings = config(
            tmp_path, port, train=train, rollouts={"per_update": 32, "samples_per_prompt": 8}, teacher={"budget": {"limit": 9.0}}
        )
        assert execute(settings, plain=True) == 0
    lines = steps_of(tmp_path / "run")
    rewards = [line["reward_mean"] for line in lines]
    assert sum(rewards[-5:]) > 2 * sum(rewards[:5]), rewards
    first = lines[0]
    assert first["reward_score"] == first["reward_mean"]
    assert first["importance_ratio"] == pytest.approx(1.0, abs=1e-4), "one step a cycle: the student is the one that wrote"
    assert 0 <= first["zero_spread_share"] <= 1
    count = first["rollout_tokens"] / first["rollout_length_mean"]
    assert count == pytest.approx(round(count))
    assert 24 < count <= 32
    assert lines[-1]["cache_misses"] == len([path for path, _ in server.requests if path.endswith("chat/completions")])
    assert lines[-1]["grades"] == lines[-1]["cache_misses"] + lines[-1]["cache_hits"]
    assert lines[-1]["bad_grades"] == 0
    cost = json.loads((tmp_path / "run" / "summary.json").read_text())["teacher_cost"]
    assert round(cost["paid"] * 1e9) == nanos(server.paid["prompt"], server.paid["answer"]) > 0


def test_a_run_whose_money_is_spent_goes_on_where_it_was_and_asks_nothing_twice(tmp_path: Path) -> None:
    server, whole = grader(), grader()
    (tmp_path / "whole").mkdir()
    with served(whole) as port:
        assert execute(config(tmp_path / "whole", port, teacher={"budget": {"limit": 9.0}}), plain=True) == 0
    per_grade = nanos(whole.paid["prompt"], whole.paid["answer"]) / len(whole.requests) / 1e9
    (tmp_path / "cut").mkdir()
    with served(server) as port:
        stops = 0
        for limit in (12 * per_grade, 25 * per_grade, 9.0):
            settings = config(tmp_path / "cut", port, teacher={"budget": {"limit": limit}})
            if limit == 9.0:
                assert execute(settings, plain=True) == 0
                break
            with pytest.raises(BudgetSpentError, match=r"raise teacher.budget.limit"):
                execute(settings, plain=True)
            stops += 1
    assert stops == 2
    asked = Counter(json.dumps(body["messages"]) for path, body in server.requests if path.endswith("chat/completions"))
    assert max(asked.values()) == 1, "what was paid for is not asked again"
    cut, uncut = steps_of(tmp_path / "cut" / "run"), steps_of(tmp_path / "whole" / "run")
    names = ("step", "loss", "kd", "reward_mean", "reward_std", "zero_spread_share", "on_policy_tokens")
    assert [[line[name] for name in names] for line in cut] == [[line[name] for name in names] for line in uncut]
    cost = json.loads((tmp_path / "cut" / "run" / "summary.json").read_text())["teacher_cost"]
    assert round(cost["paid"] * 1e9) == nanos(server.paid["prompt"], server.paid["answer"])


def test_bad_grades_are_asked_for_again_and_then_reject_their_rollout(tmp_path: Path) -> None:
    def grade(messages: list[dict[str, str]]) -> str:
        size = len(answer_in(messages))
        if size % 3 == 0:
            return "I would rather not."
        return '{"style": 4, "truth": "high"}' if size % 3 == 1 and len(messages) == 1 else '{"style": 4, "truth": 2}'

    rubric = {"criteria": [{"name": "truth", "text": "a"}, {"name": "style", "text": "b"}], "scale": [0, 4], "retries": 1}
    server = grader(grade)
    with served(server) as port:
        assert execute(config(tmp_path, port, grading=rubric, rollouts={"max_staleness": 1}), plain=True) == 0
    run = tmp_path / "run"
    lines, rejected = steps_of(run), [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    assert {entry["reason"] for entry in rejected} == {"ungraded"}
    assert all("'I would rather not.' is not the form asked for" in entry["detail"] for entry in rejected)
    assert all(line["reward_truth"] == 0.5 and line["reward_style"] == 1.0 and line["reward_mean"] == 0.75 for line in lines)
    assert all(line["zero_spread_share"] == 1.0 and line["kd"] == 0.0 for line in lines), "equal rewards teach nothing"
    bad = [body["messages"] for path, body in server.requests if path.endswith("chat/completions") and len(body["messages"]) == 3]
    assert lines[-1]["bad_grades"] >= len(bad) > 0
    assert {messages[1]["content"] for messages in bad} == {"I would rather not.", '{"style": 4, "truth": "high"}'}
    state = json.loads((run / "summary.json").read_text())
    assert state["rejected"]["ungraded"] == len(rejected) > 0


def test_labelled_text_keeps_its_cross_entropy_beside_the_rewards(tmp_path: Path) -> None:
    server = grader()
    with served(server) as port:
        settings = config(tmp_path, port, objective={"alpha": 0.5}, rollouts={"on_policy_fraction": 0.5}, train={"batch_tokens": 80})
        assert execute(settings, plain=True) == 0
    for line in steps_of(tmp_path / "run"):
        assert line["ce"] > 0
        assert line["labelled_tokens"] > 0
        assert line["signal_tokens"] == line["rollout_tokens"]


def test_the_doctor_looks_over_a_run_that_is_graded(tmp_path: Path) -> None:
    async def look(settings: RunConfig) -> dict[str, Finding]:
        return {finding.name: finding async for finding in examine_run(settings)}

    server = grader()
    with served(server) as port:
        found = asyncio.run(look(config(tmp_path, port)))
    assert {name for name, one in found.items() if one.status not in ("pass", "skip", "warn")} == set()
    assert "verbal at T = 1 asks for text" in found["signal"].detail
    assert found["cost"].status == "pass"
    assert "EUR" in found["cost"].detail
    assert any("<answer>" in body["messages"][0]["content"] for path, body in server.requests if path.endswith("chat/completions"))


@pytest.mark.parametrize(
    ("sections", "error"),
    [
        ({"teacher": {"grading": None}}, "without teacher.grading: a rubric belongs to"),
        ({"objective": {"name": "seqkd"}, "train": {"labelled_tokens": 9}}, "objective.name seqkd with teacher.grading"),
        ({"teacher": {"signal": "full"}}, "seqkd, gad and verbal learn from what the teacher writes"),
        ({"rollouts": {"samples_per_prompt": 1}}, r"samples_per_prompt 1 must be 2 or more"),
        ({"rollouts": {"samples_per_prompt": 3}}, r"samples_per_prompt 3 must be 2 or more, and a divisor of the 8 rollouts"),
        ({"objective": {"temperature": 2.0}}, "set both to the same"),
        ({"rollouts": {"top_p": 0.9}}, "set top_p=1"),
        ({"rollouts": {"on_policy_fraction": [1.0, 0.5]}}, "needs whole groups in every cycle"),
        ({"teacher": {"writes_labels": True}}, "the teacher grades answers and writes none"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_opened(tmp_path: Path, sections, error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        config(tmp_path, 1, **sections)


def test_the_objective_wants_a_teacher_that_writes() -> None:
    objective = make_objective(ObjectiveConfig(name="verbal", temperature=0.8))
    assert objective.needs == ("text",)
    want = signal_for(objective, TeacherConfig(target="grpc://localhost:1", signal="text"))
    assert want == SignalSpec("text", temperature=0.8)
    with pytest.raises(ConfigError, match=r"teacher.signal to text"):
        signal_for(objective, TeacherConfig(target="grpc://localhost:1"))
    with pytest.raises(TeacherError, match="offers full"):
        check_offer(objective, TeacherInfo("t", 9, (Offer("full"),)), want)
