"""Money: set aside before a request, counted after it, never more than the limit; and a run that stops when it is spent and goes on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from bbopd.config import ApiConfig
from bbopd.errors import BudgetSpentError, ConfigError
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.budget import Budget, Prices
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.teachers.paid import PaidTeacher
from bbopd.types import Sampling, ScoredRollout, SignalSpec
from tests.fault_registry import fault
from tests.faults import assert_nothing_lost, make_rollouts, stream
from tests.test_openai_teacher import VOCAB, connected, serve
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.timeout(600)

TOPK = SignalSpec("topk", top_k=8)
PRICES = Prices(prompt=2.0, answer=6.0, currency="EUR")


def nanos(prompt: int, answer: int) -> int:
    return 2000 * prompt + 6000 * answer


# ---------------------------------------------------------------- the sum


async def test_sums_are_exact_and_the_limit_holds_whatever_happens(tmp_path):
    """Many requests at once, of random size and outcome, by two that share the file: at no moment more than the limit is promised."""
    limit = 0.4
    budgets = [Budget(tmp_path / "spending.db", PRICES, limit) for _ in range(2)]
    random = np.random.default_rng(0)
    paid: list[int] = []
    spent = Counter()

    async def request(number: int) -> None:
        budget = budgets[number % 2]
        prompt, answer = (int(count) for count in random.integers(1, 2000, 2))
        await asyncio.sleep(random.random() * 0.05)
        try:
            reservation = await budget.reserve(prompt, answer)
        except BudgetSpentError:
            spent["refused"] += 1
            return
        assert budget.spending().total <= limit + 1e-12
        await asyncio.sleep(random.random() * 0.05)
        if random.random() < 0.3:
            budget.release(reservation)
        elif random.random() < 0.5:
            budget.settle(reservation)
            paid.append(nanos(prompt, answer))
        else:
            budget.settle(reservation, prompt, answer // 2)
            paid.append(nanos(prompt, answer // 2))

    await asyncio.gather(*(request(number) for number in range(150)))
    now = budgets[0].spending()
    assert round(now.paid * 1e9) == sum(paid)
    assert (now.reserved, now.requests, now.currency) == (0.0, len(paid), "EUR")
    assert spent["refused"] > 0
    for budget in budgets:
        budget.close()


async def test_what_is_under_way_may_still_make_room(tmp_path):
    budget = Budget(tmp_path / "spending.db", PRICES, limit=nanos(1000, 1000) / 1e9)
    first = await budget.reserve(1000, 1000)
    second = asyncio.create_task(budget.reserve(100, 100))
    third = asyncio.create_task(budget.reserve(900, 900))
    await asyncio.sleep(0.1)
    assert not second.done()
    budget.settle(first, 500, 0)
    reservation = await second
    await asyncio.sleep(0.1)
    assert not third.done(), "what the second has set aside may come back"
    budget.settle(reservation)
    with pytest.raises(BudgetSpentError, match=r"budget of 0.008 EUR is spent: 0.0018 paid, and the next request may cost 0.0072; raise"):
        await third
    budget.close()


async def test_a_request_given_up_while_it_is_paid_for_leaves_nothing_behind(tmp_path):
    budget = Budget(tmp_path / "spending.db", PRICES, limit=1.0)
    for _ in range(20):
        task = asyncio.create_task(budget.reserve(10, 10))
        await asyncio.sleep(0)
        task.cancel()
    await until(lambda: budget.spending().total == 0.0)
    budget.close()


@fault("a run killed between a request and its answer (SIGKILL)", "what was set aside for the request stays counted: it may have been paid")
async def test_a_killed_process_leaves_its_requests_counted(tmp_path):
    path = tmp_path / "spending.db"
    code = (
        "import asyncio, sys; from bbopd.teachers.budget import Budget, Prices\n"
        "async def main():\n"
        f"    budget = Budget({str(path)!r}, Prices(2.0, 6.0, 'EUR'), 1.0)\n"
        "    budget.settle(await budget.reserve(100, 0)); await budget.reserve(7, 1); budget.spending()\n"
        "    print('ready', flush=True); await asyncio.sleep(3600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        os.kill(process.pid, signal.SIGKILL)
    budget = Budget(path, PRICES, 1.0)
    now = budget.spending()
    assert (round(now.paid * 1e9), round(now.reserved * 1e9)) == (nanos(100, 0), nanos(7, 1))
    budget.close()


def test_one_file_counts_one_currency(tmp_path):
    Budget(tmp_path / "spending.db", PRICES).close()
    with pytest.raises(ConfigError, match="counts EUR, the teacher's prices are in USD"):
        Budget(tmp_path / "spending.db", Prices(2.0, 6.0, "USD"))


# ---------------------------------------------------------------- passes


async def collect(answers, into: list[ScoredRollout]) -> None:
    async for answer in answers:
        into.append(answer)


@fault("budget reached", "waits for what is under way, keeps it, then stops the run with a checkpoint; a larger budget goes on from there")
async def test_a_pass_that_runs_out_of_money_keeps_what_it_paid_for(tmp_path):
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(40, VOCAB)
    server = serve(backend)
    server.spoil = lambda path, body, reply: setattr(reply, "delay", 0.02)
    scored: list[ScoredRollout] = []
    for limit in (nanos(250, 14) / 1e9, 1.0):
        budget = Budget(tmp_path / "spending.db", PRICES, limit)
        async with connected(server, budget=budget, api=ApiConfig(scoring="prompt_logprobs")) as teacher:
            cached = CachedTeacher(teacher, AnswerStore(tmp_path / "answers.db"))
            scored.clear()
            if limit < 1.0:
                with pytest.raises(BudgetSpentError, match="is spent"):
                    await collect(cached.score(stream(rollouts), TOPK), scored)
                assert 0 < len(scored) < len(rollouts)
            else:
                await collect(cached.score(stream(rollouts), TOPK), scored)
            await cached.close()
        now = budget.spending()
        assert round(now.paid * 1e9) == nanos(server.paid["prompt"], server.paid["answer"])
        assert now.reserved == 0.0
        assert now.paid <= limit
        budget.close()
    assert_nothing_lost(backend, rollouts, scored, TOPK)
    asked = Counter(tuple(body["prompt"]) for path, body in server.requests if "prompt_logprobs" in body and len(body["prompt"]) != 16)
    assert set(asked.values()) == {1}, "nothing is asked, nor paid, twice"


async def test_a_pass_without_money_for_a_single_item_ends_at_once(tmp_path):
    """All items wait for money at the same time, and none of them is under way."""
    budget = Budget(tmp_path / "spending.db", PRICES, (nanos(16, 1) + 1) / 1e9)
    scored: list[ScoredRollout] = []
    async with connected(serve(), budget=budget, api=ApiConfig(scoring="prompt_logprobs")) as teacher:
        async with asyncio.timeout(2 * PATIENCE):
            with pytest.raises(BudgetSpentError):
                await collect(teacher.score(stream(make_rollouts(40, VOCAB)), TOPK), scored)
    assert not scored
    budget.close()


async def test_a_teacher_that_does_not_count_is_counted_for(tmp_path):
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(30, VOCAB)
    budget = Budget(tmp_path / "spending.db", PRICES, limit=nanos(300, 0) / 1e9)
    teacher = PaidTeacher(FakeTeacher(backend), budget)
    scored: list[ScoredRollout] = []
    with pytest.raises(BudgetSpentError):
        await collect(teacher.score(stream(rollouts), TOPK), scored)
    assert_nothing_lost(backend, [item.rollout for item in scored], scored, TOPK)
    now = budget.spending()
    assert 0 < now.prompt_tokens == sum(len(item.rollout.all_ids) for item in scored) <= 300
    assert now.reserved == 0.0
    budget.close()
    budget = Budget(tmp_path / "spending.db", PRICES, limit=1.0)
    prompts = [rollout.prompt for rollout in rollouts[:5]]
    written = [answer async for answer in PaidTeacher(FakeTeacher(backend), budget).complete(stream(prompts), Sampling(20, seed=1))]
    then = budget.spending()
    assert then.answer_tokens == sum(len(answer.token_ids) for answer in written)
    assert then.prompt_tokens - now.prompt_tokens == sum(len(prompt.token_ids) for prompt in prompts)
    budget.close()
