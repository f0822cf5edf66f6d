"""Whole runs with an OpenAI-compatible endpoint as their teacher: one whose money runs out, and one that only reads what it writes."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.errors import BudgetSpentError
from bbopd.report.table import plain_lines
from bbopd.teachers.hf import HFBackend
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.openai_runs import run_config, served
from tests.openai_server import CHAT, OpenAIServer
from tests.test_budget import nanos
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)


def test_a_run_stops_with_a_checkpoint_when_the_money_is_spent_and_goes_on_with_more(tmp_path):
    tokenizer = tiny_tokenizer()
    server = OpenAIServer(HFBackend(tiny_llama(vocab_size=262, seed=1), tokenizer, name="tiny"), decode=tokenizer.decode)

    def config(port: int, limit: float) -> RunConfig:
        return run_config(tmp_path, port, teacher={"topk": 8, "budget": {"limit": limit}, "api": {"scoring": "prompt_logprobs"}})

    run = tmp_path / "run"
    with served(server) as port:
        with pytest.raises(BudgetSpentError, match=r"raise teacher.budget.limit, and the same command goes on") as spent:
            execute(config(port, nanos(400, 20) / 1e9), plain=True)
        assert spent.value.exit_code == 7
        assert latest_checkpoint(run / "checkpoints") is not None
        stopped = json.loads((run / "summary.json").read_text())
        assert (stopped["status"], stopped["error"]) == ("stopped", str(spent.value))
        assert "of 0.00092" in (run / "report.html").read_text()
        assert execute(config(port, 1.0), plain=True) == 0

    summary = json.loads((run / "summary.json").read_text())
    cost = summary["teacher_cost"]
    assert round(cost["paid"] * 1e9) == nanos(server.paid["prompt"], server.paid["answer"])
    assert (cost["reserved"], cost["currency"], cost["limit"]) == (0.0, "EUR", 1.0)
    costs = [json.loads(line)["teacher_cost"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(costs) > 2
    assert costs == sorted(costs)
    assert 0 < costs[0] < costs[-1] <= cost["paid"]
    assert any(line.startswith(f"cost of the teacher: {cost['paid']:.6g} EUR of 1") for line in plain_lines(run))
    asked = Counter(tuple(body["prompt"]) for path, body in server.requests if "prompt_logprobs" in body)
    probes = [ids for ids, times in asked.items() if times > 1]
    assert len(probes) <= 1, "nothing but the question that each start asks is asked twice"


def test_a_run_that_learns_from_what_an_endpoint_writes(tmp_path):
    """Messages go out, text comes back: the teacher's tokens are its own business."""
    other = tiny_tokenizer(merges=(("o", "n"), ("a", "n"), ("an", "d"), ("e", "r")))
    backend = HFBackend(tiny_llama(vocab_size=263, seed=1), other, name="tiny")
    server = OpenAIServer(backend, encode=lambda text: other(text)["input_ids"], ways=[CHAT])
    with served(server) as port:
        config = run_config(
            tmp_path,
            port,
            teacher={"signal": "text", "answers": {"max_new_tokens": 12}, "budget": {"limit": 1.0}},
            objective={"name": "seqkd"},
            train={"labelled_tokens": 60},
        )
        assert execute(config, plain=True) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert round(summary["teacher_cost"]["paid"] * 1e9) == nanos(server.paid["prompt"], server.paid["answer"]) > 0
    asked = [body["messages"] for path, body in server.requests if path.endswith("chat/completions")]
    corpus = (tmp_path / "text.txt").read_text()
    assert asked
    assert all(message["role"] == "user" and message["content"].strip() in corpus for messages in asked for message in messages)
