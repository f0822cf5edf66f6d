"""A whole run against two replicas and a cache: compared at the start, and a second run like it asks them nothing."""

from __future__ import annotations

import asyncio
import json
import re

import pytest

from bbopd.rpc.server import start_server
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.fake import FakeBackend
from tests.cli_runs import WORDS, bbopd, losses, steps, write_config
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

SMALL = {"cold_start_tokens": 50, "on_policy_tokens": 100}


@pytest.mark.thorough
@pytest.mark.timeout(600)
async def test_a_run_of_two_replicas_and_one_that_repeats_it_from_the_cache(tmp_path):
    model = save_folder(tmp_path / "model", tiny_llama(vocab_size=262, layers=4), tiny_tokenizer())
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n\n".join(" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40)))
    backends = [FakeBackend(262), FakeBackend(262)]
    servers = [await start_server(backend) for backend in backends]

    targets = [f"grpc://127.0.0.1:{server.port}" for server in servers]
    teacher = {"serve": None, "target": targets, "cache": {"path": str(tmp_path / "answers.db")}}

    async def run(name: str):
        folder = tmp_path / name
        folder.mkdir()
        return folder / "run", await asyncio.to_thread(
            bbopd, "distill", str(write_config(folder, model, text, teacher=teacher, train=SMALL))
        )

    try:
        first, result = await run("first")
        assert result.returncode == 0, result.stderr
        assert re.search(
            r"replicas of the teacher differ by at most 0 of a token's probability \(0\.05 allowed\)", result.stdout + result.stderr
        )
        scored = [sum(backend.calls) for backend in backends]
        store = AnswerStore(tmp_path / "answers.db")
        stats = store.stats()
        store.close()
        assert not stats.unfinished
        assert sum(scored) >= sum(count for _, _, count, _ in stats.rows)

        second, result = await run("second")
        assert result.returncode == 0, result.stderr
        assert losses(second) == losses(first)
        compared = 3 * 4  # rounds of four texts
        summaries = [json.loads((run / "summary.json").read_text())["teacher_cache"] for run in (first, second)]
        assert summaries[0]["misses"] == sum(count for _, _, count, _ in stats.rows)
        assert summaries[1]["hits"] >= summaries[0]["misses"] > 0
        assert summaries[1]["misses"] == steps(second)[-1]["cache_misses"] == 0 < steps(second)[-1]["cache_hits"]
        assert "answers were kept from before" in (second / "report.html").read_text()
        assert [sum(backend.calls) - before for backend, before in zip(backends, scored, strict=True)] == [compared, compared]
    finally:
        for server in servers:
            await server.stop(0)
