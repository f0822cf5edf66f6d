"""A judge's verdicts: both orders of every pair, strictly read, against a count by hand."""

from __future__ import annotations

from contextlib import AsyncExitStack

import pytest

from bbopd.config import EvalConfig
from bbopd.errors import TeacherError
from bbopd.evaluate.win_rate import Pair, win_rate
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.progress import Silent
from bbopd.pipeline.teacher import open_judge
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Completion, Offer, TeacherInfo
from tests.openai_server import OpenAIServer
from tests.tiny_models import tiny_tokenizer


def answers_in(question: str) -> tuple[str, str]:
    first, second = (question.split(f"<answer_{name}>\n")[1].split("\n</answer")[0] for name in "ab")
    return first, second


class Judge:
    """Says what ``verdict`` makes of the two answers, in the order in which it sees them."""

    info = TeacherInfo("judge", 9, (Offer("text"),), takes_text=True)

    def __init__(self, verdict) -> None:
        self._verdict = verdict
        self.asked: list[str] = []

    async def score(self, rollouts, want):
        raise NotImplementedError
        yield

    async def complete(self, prompts, sampling):
        asked = [prompt async for prompt in prompts]
        for prompt in reversed(asked):
            text = prompt.messages[0][1]
            self.asked.append(text)
            first, second = answers_in(text)
            yield Completion(prompt, (1,), self._verdict(first, second), "stop")


PAIRS = [Pair(str(n), f"say {n}", student="s" * n, teacher="tttt") for n in range(1, 8)]  # lengths 1 to 7 against 4


def longer(first: str, second: str) -> str:
    return "tie" if len(first) == len(second) else "A" if len(first) > len(second) else "B"


async def test_the_better_answer_wins_in_both_orders():
    judge = Judge(longer)
    found = await win_rate(judge, PAIRS)
    assert (found.value, found.pairs, found.unread) == (pytest.approx(0.5), 7, 0)
    assert len(judge.asked) == 14
    assert (await win_rate(Judge(longer), PAIRS[4:])).value == 1.0
    wins = [0, 0, 0, 0.5, 1, 1]
    found = await win_rate(Judge(longer), PAIRS[:6])
    mean = sum(wins) / 6
    assert found.value == pytest.approx(mean)
    assert found.standard_error == pytest.approx((sum((win - mean) ** 2 for win in wins) / 5 / 6) ** 0.5)
    assert (await win_rate(Judge(longer), PAIRS[:1])).standard_error is None


async def test_a_judge_that_always_likes_the_first_says_nothing():
    found = await win_rate(Judge(lambda first, second: "A."), PAIRS)
    assert (found.value, found.standard_error) == (0.5, 0.0)


async def test_what_is_no_verdict_leaves_its_pair_out():
    def rambling(first: str, second: str) -> str:
        return "I think A" if first == "ssssss" else longer(first, second).lower()

    found = await win_rate(Judge(rambling), PAIRS)
    assert (found.pairs, found.unread) == (6, 1)
    assert found.value == pytest.approx((0 + 0 + 0 + 0.5 + 1 + 1) / 6)
    with pytest.raises(TeacherError, match=r"verdict on none of 7 pairs, but such as 'both are fine'.*eval.judge"):
        await win_rate(Judge(lambda first, second: "both are fine"), PAIRS)


async def test_a_judge_behind_an_endpoint_is_asked_once_about_the_same_two_answers(tmp_path):
    tokenizer = tiny_tokenizer()
    server = OpenAIServer(
        FakeBackend(len(tokenizer)),
        encode=lambda text: tokenizer(text)["input_ids"],
        ways=[],
        grade=lambda messages: longer(*answers_in(messages[-1]["content"])),
    )
    async with server.serving() as port:
        config = EvalConfig.model_validate({"judge": {"target": f"openai://127.0.0.1:{port}/v1", "timeout": 60}}).judge
        counts = []
        for _ in range(2):
            async with AsyncExitStack() as stack:
                judge = await open_judge(config, tokenizer, len(tokenizer), RunFolder(tmp_path), stack, Silent())
                found = await win_rate(judge, PAIRS[3:])
                counts.append(sum("answer_a" in str(body) for path, body in server.requests if path == "/v1/chat/completions"))
            assert (found.value, found.pairs, found.unread) == (pytest.approx(3.5 / 4), 4, 0)
        assert counts == [8, 8], "both orders of four pairs; the second time its replies come from the run's folder"


async def test_a_judge_that_takes_no_messages_is_refused(tmp_path):
    server = await start_server(FakeBackend(20))
    config = EvalConfig.model_validate({"judge": {"target": server.target}}).judge
    try:
        async with AsyncExitStack() as stack:
            with pytest.raises(TeacherError, match=r"judge fake-20-0 takes no messages: set eval.judge.target to one with a chat template"):
                await open_judge(config, tiny_tokenizer(), 20, RunFolder(tmp_path), stack, Silent())
    finally:
        await server.stop(0)
