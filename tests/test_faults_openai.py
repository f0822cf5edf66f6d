"""An OpenAI-compatible endpoint that fails in every way: nothing is lost, nothing put in the wrong place, nothing waits for ever."""

from __future__ import annotations

import asyncio
import copy
import itertools
import time
from collections.abc import AsyncIterator
from email.utils import formatdate

import pytest

from bbopd.config import ApiConfig, TeacherConfig
from bbopd.errors import BudgetSpentError, TeacherError
from bbopd.teachers.budget import Budget, Prices
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.openai import OpenAITeacher
from bbopd.teachers.openai_rate import RateLimits
from bbopd.types import ScoredRollout, SignalSpec
from tests.fault_registry import fault
from tests.faults import assert_nothing_lost, make_rollouts, score_all, stream
from tests.openai_server import ECHO, SGLANG, VLLM, Reply
from tests.test_openai_teacher import TOKENIZER, VOCAB, connected, serve
from tests.waiting import PATIENCE, hasty, hurried, unused_port

TOPK = SignalSpec("topk", top_k=8)
RETRIED = "refuses the answer by name, counts it, asks again"


def once(times: int = 1):
    """Whether a spoiler still has to do its work."""
    left = iter(range(times))
    return lambda: next(left, None) is not None


async def ask(spoil, *, times: int = 1, way: str = VLLM, count: int = 6, budget: Budget | None = None, **options):
    """Score a few rollouts with an endpoint that spoils its first answers; check them; give the teacher and the server."""
    backend = FakeBackend(VOCAB)
    server = serve(backend, ways=[way])
    rollouts = make_rollouts(count, VOCAB)
    async with connected(server, budget=budget, **options) as teacher:
        is_due = once(times)
        server.spoil = lambda path, body, reply: spoil(reply) if is_due() else None
        scored = await score_all(teacher, rollouts, TOPK)
        assert_nothing_lost(backend, rollouts, scored, TOPK)
        return teacher, server


# ---------------------------------------------------------------- answers that are wrong


def rows(how):
    """Change vLLM's ``prompt_logprobs``."""

    def spoil(reply: Reply) -> None:
        reply.body = copy.deepcopy(reply.body)
        how(reply.body["choices"][0]["prompt_logprobs"])

    return spoil


def last_row(how):
    return rows(lambda given: how(given[-1]))


def to(value):
    """Give the likeliest token of the last row another logprob."""
    return last_row(lambda row: max(row.values(), key=lambda entry: entry["logprob"]).update(logprob=value))


def raw(content: bytes):
    return lambda reply: setattr(reply, "raw", content)


def exchange_rows(given):
    given[1:] = given[:0:-1]


WRONG = {
    "JSON cut short": (raw(b'{"choices": [{"prompt_lo'), "is no JSON"),
    "no JSON at all": (raw(b"<html>bad gateway</html>"), "is no JSON"),
    "NaN in JSON": (to(float("nan")), "NaN is no number"),
    "NaN as text": (to("nan"), "logprob nan"),
    "null for a logprob": (to(None), "not formed as it should be"),
    "positive logprob": (to(0.7), "total probability is not 1|logprob 0.7"),
    "another probability": (to(-20.0), "of the probability is missing|do not belong"),
    "Σp above 1": (rows(lambda given: [entry.update(logprob=-0.1) for entry in given[-1].values()]), "total probability is not 1"),
    "positions short": (rows(lambda given: given.pop()), "prompt_logprobs is .* long, .* tokens were sent"),
    "positions long": (rows(lambda given: given.append(given[-1])), "prompt_logprobs is .* long"),
    "fewer than k": (last_row(lambda row: row.pop(min(row, key=lambda key: row[key]["logprob"]))), "KeyError|has 7 ids, asked were 8"),
    "own token missing": (rows(lambda given: given.__setitem__(-1, {"999": {"logprob": -1.0}})), "KeyError"),
    "ids ≥ V": (last_row(lambda row: row.update({"320": row.pop(_other(row))})), "outside the vocabulary|KeyError"),
    "ids negative": (last_row(lambda row: row.update({"-4": row.pop(_other(row))})), "has id -4"),
    "ids that are no numbers": (last_row(lambda row: row.update({"the": row.pop(_other(row))})), "invalid literal"),
    "rows exchanged": (rows(exchange_rows), "KeyError|do not belong"),
    "no choice": (lambda reply: reply.body.update(choices=[]), "0 choices came back"),
    "another document": (lambda reply: setattr(reply, "body", ["hello"]), "not formed as it should be"),
    "an answer far too large": (raw(b" " * (2**20)), "has more than"),
}


def _other(row) -> str:
    """An id of a row that is not likely to be the token itself: the likeliest."""
    return max(row, key=lambda key: row[key]["logprob"])


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_answer_of_an_endpoint(name):
    spoil, _ = WRONG[name]
    teacher, _ = await ask(spoil)
    assert teacher.counters == {"bad_answers": 1, "retries": 1}


for name in WRONG:
    fault(f"from an endpoint: {name}", RETRIED)(test_a_wrong_answer_of_an_endpoint)


@pytest.mark.parametrize("name", WRONG)
@fault("an endpoint's answer wrong every time", "asks three times more, then ends the pass naming the item and what was wrong")
async def test_an_endpoint_that_is_always_wrong(name):
    spoil, message = WRONG[name]
    with pytest.raises(TeacherError, match=f"did not answer rollout r0: .*(?:{message})"):
        await ask(spoil, times=1000, count=1)


@pytest.mark.parametrize("way", [SGLANG, ECHO])
@fault("ids in an answer that were not sent (SGLang, echo)", RETRIED)
async def test_other_ids_than_were_sent(way):
    def spoil(reply: Reply) -> None:
        reply.body = copy.deepcopy(reply.body)
        if way == SGLANG:
            reply.body["meta_info"]["input_token_logprobs"][-1][1] += 1
        else:
            reply.body["choices"][0]["logprobs"]["tokens"][0] = "token_id:319"

    teacher, _ = await ask(spoil, way=way)
    assert teacher.counters["bad_answers"] == 1


# ---------------------------------------------------------------- refusals


def refuse(status: int, message: str = "no", code: str | None = None, **headers: str):
    def spoil(reply: Reply) -> None:
        reply.status, reply.body = status, {"error": {"message": message, "code": code}}
        reply.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    return spoil


@pytest.mark.parametrize(("how", "times"), [("seconds", 5), ("date", 1)])
@fault("429 with Retry-After, from an endpoint", "all its requests wait for as long as it asks; it does not count against the item")
async def test_too_many_requests(how, times):
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(8, VOCAB)
    server = serve(backend)
    async with connected(server, inflight_tokens=1) as teacher:  # one after another
        asked_at: list[float] = []

        def spoil(path, body, reply):
            asked_at.append(time.monotonic())
            if len(asked_at) <= times:  # more often than an item may fail
                refuse(429, Retry_After="0.3" if how == "seconds" else formatdate(time.time() + 1.999, usegmt=True))(reply)

        server.spoil = spoil
        scored = await score_all(teacher, rollouts, TOPK)
    assert_nothing_lost(backend, rollouts, scored, TOPK)
    assert teacher.counters == {"retries": times, "bad_answers": 0}
    pauses = [later - sooner for sooner, later in itertools.pairwise(asked_at)]
    assert min(pauses[:times]) >= 0.29, "nothing is sent before the time is over"


@pytest.mark.parametrize("status", [500, 502, 503])
@fault("500, 502, 503 from an endpoint", "asks again after a pause; it pays nothing for them")
async def test_a_server_error(status, tmp_path):
    budget = Budget(tmp_path / "spending.db", Prices(1.0, 1.0), 1.0)
    teacher, server = await ask(refuse(status), times=2, budget=budget)
    assert teacher.counters["retries"] == 2
    assert budget.spending().prompt_tokens == server.paid["prompt"]
    budget.close()


@fault("a request that an endpoint refuses (400)", "ends the pass at once, naming the item and what was said")
async def test_a_refused_request():
    with pytest.raises(TeacherError, match="did not answer rollout r0: HTTP 400: the prompt is too poor"):
        await ask(refuse(400, "the prompt is too poor"), count=1)


@pytest.mark.parametrize(("status", "code"), [(402, None), (429, "insufficient_quota")])
@fault("an account without money (402, `insufficient_quota`)", "keeps what is under way, then stops the run with a checkpoint")
async def test_an_account_without_money(status, code):
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(20, VOCAB)
    server = serve(backend)
    async with connected(server) as teacher:
        count = itertools.count()
        server.spoil = lambda path, body, reply: (
            refuse(status, "pay first", code)(reply) if next(count) > 4 else setattr(reply, "delay", 0.3)
        )
        scored: list[ScoredRollout] = []
        with pytest.raises(BudgetSpentError, match=r"has no money left .*pay first"):
            await _collect(teacher.score(stream(rollouts), TOPK), scored)
    assert len(scored) == 5, "those under way are waited for"


async def _collect(answers: AsyncIterator[ScoredRollout], into: list[ScoredRollout]) -> None:
    async for answer in answers:
        into.append(answer)


# ---------------------------------------------------------------- connections


@fault("an endpoint's connection cut in the middle of an answer", "asks again; the answer counts as paid")
async def test_a_cut_connection(tmp_path):
    budget = Budget(tmp_path / "spending.db", Prices(1.0, 1.0), 1.0)
    teacher, server = await ask(lambda reply: setattr(reply, "cut_after", 30), times=3, budget=budget)
    assert teacher.counters["retries"] == 3
    assert budget.spending().prompt_tokens == server.paid["prompt"]
    budget.close()


@fault("an endpoint that cuts the connection on one item always", "ends the pass after six times, naming the item")
async def test_an_item_that_breaks_every_connection():
    with pytest.raises(TeacherError, match=r"did not answer rollout r0: .*(ReadError|RemoteProtocolError)"):
        await ask(lambda reply: setattr(reply, "cut_after", 30), times=1000, count=1)


@fault("an endpoint that becomes a black hole", "gives up after `teacher.timeout` without an answer")
async def test_an_endpoint_that_says_nothing():
    with pytest.raises(TeacherError, match=r"has not answered for 1.5 s \(teacher.timeout\).*0 items were answered"):
        await asyncio.wait_for(ask(lambda reply: setattr(reply, "silent", True), times=1000, timeout=1.5), PATIENCE)


@fault("no endpoint at the address", "tries for a while, then says so; one that comes up in time is taken")
async def test_an_endpoint_that_is_down_at_start():
    port = unused_port()
    config = TeacherConfig(target=f"openai://127.0.0.1:{port}/v1", topk=8, start_timeout=1.0)
    with pytest.raises(TeacherError, match=r"no OpenAI-compatible endpoint at .* answered within 1 s .*ConnectError"):
        await OpenAITeacher.connect(config, tokenizer=TOKENIZER, vocab_size=VOCAB)

    patient = config.model_copy(update={"start_timeout": PATIENCE})
    connecting = asyncio.create_task(OpenAITeacher.connect(patient, tokenizer=TOKENIZER, vocab_size=VOCAB))
    await asyncio.sleep(0.5)
    async with serve().serving(port):
        teacher = await connecting
        await teacher.close()


@fault("an endpoint that is started anew in the middle of a run", "goes on with what was not answered")
async def test_an_endpoint_that_is_started_anew():
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(30, VOCAB)
    first, second = serve(backend), serve(backend)
    first.spoil = second.spoil = lambda path, body, reply: setattr(reply, "delay", 0.05)
    async with first.serving(unused_port()) as port:
        config = TeacherConfig(target=f"openai://127.0.0.1:{port}/v1", topk=8, timeout=PATIENCE, inflight_tokens=128)
        teacher = await OpenAITeacher.connect(config, tokenizer=TOKENIZER, vocab_size=VOCAB)
        scoring = asyncio.create_task(score_all(teacher, rollouts, TOPK))
        while len(first.requests) < 15:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.3)
    async with second.serving(port):
        scored = await scoring
    await teacher.close()
    assert_nothing_lost(backend, rollouts, scored, TOPK)
    assert teacher.counters["retries"] > 0


# ---------------------------------------------------------------- rates


@hasty
async def test_a_rate_is_kept_to_and_its_waits_are_no_silence():
    """One at once, and the others every 75 seconds, with a timeout shorter than the waits."""
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(4, VOCAB, length=5)
    server, clock = serve(backend), asyncio.get_running_loop().time
    async with connected(server, api=ApiConfig(scoring="prompt_logprobs"), timeout=60.0) as teacher:
        teacher._client._rates = RateLimits(requests_per_minute=0.8, clock=clock)
        before, started = len(server.requests), clock()
        async with hurried(1.0):
            scored = await score_all(teacher, rollouts, TOPK)
        seconds = clock() - started
    assert_nothing_lost(backend, rollouts, scored, TOPK)
    assert len(server.requests) == before + 4
    assert seconds >= 3 * 75.0 - 0.001
