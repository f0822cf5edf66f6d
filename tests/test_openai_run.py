"""Whole runs with an OpenAI-compatible endpoint as their teacher: one whose money runs out, and one that only reads what it writes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.errors import BudgetSpentError
from bbopd.report.table import plain_lines
from bbopd.teachers.hf import HFBackend
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.openai_server import CHAT, OpenAIServer
from tests.test_budget import nanos
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(300)


@contextmanager
def served(server: OpenAIServer, at: int = 0) -> Iterator[int]:
    """The server on a thread of its own: a run blocks the event loop while it trains."""
    ports: list[int] = []
    is_up, stop, loop = threading.Event(), asyncio.Event(), asyncio.new_event_loop()

    async def run() -> None:
        async with server.serving(at) as port:
            ports.append(port)
            is_up.set()
            await stop.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        assert is_up.wait(30)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
        loop.close()


def run_config(folder: Path, port: int, **sections) -> RunConfig:
    """A run of a tiny student on a few lines of text, within ``folder``."""
    model = folder / "model"
    if not model.exists():
        save_folder(model, tiny_llama(vocab_size=262), tiny_tokenizer())
        lines = (f"{n} the thin thing in there, then {n * n} more of them and so on" for n in range(40))
        (folder / "text.txt").write_text("\n\n\n".join(lines))
    base = {
        "student": {"model": str(model), "dtype": "float32"},
        "teacher": {"target": f"openai://127.0.0.1:{port}/v1", "prices": {"prompt": 2.0, "answer": 6.0, "currency": "EUR"}},
        "objective": {"temperature": 1.0},
        "rollouts": {"per_update": 4, "samples_per_prompt": 1, "max_new_tokens": 10, "max_staleness": 0},
        "train": {"batch_tokens": 40, "max_seq_len": 48, "on_policy_tokens": 120, "checkpoint_every": 1},
        "data": {
            "prompts": [{"text": str(folder / "text.txt")}],
            "prompt_tokens": 8,
            "response_tokens": 10,
            "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 2, "rollouts": 2, "max_new_tokens": 8},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        base[name] = {**base[name], **values}
    return RunConfig.model_validate(base)


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
