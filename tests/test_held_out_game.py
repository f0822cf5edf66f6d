"""The game on held-out prompts: figures against a count by hand, with a judge and without."""

from __future__ import annotations

import pytest

from bbopd.config import TrainConfig
from bbopd.evaluate.held_out_game import HeldOutGame
from bbopd.teachers.written import WritingTeacher
from bbopd.trainer.discriminator import Contest, Discriminator
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, TeacherInfo
from tests.test_win_rate import Judge, longer
from tests.tiny_models import tiny_llama, tiny_tokenizer

PROMPTS = [Prompt(f"p{n}", (40 + n, 50), text=f"say {n}") for n in range(9)]


class Engine:
    """Its answer to prompt ``p<n>`` is n bytes, none to the first."""

    def __init__(self) -> None:
        self.sampling: list[Sampling] = []

    async def generate(self, prompts, sampling):
        self.sampling.append(sampling)
        asked = [prompt async for prompt in prompts]
        for draw, prompt in reversed(list(enumerate(asked))):
            yield Rollout(f"r{draw}", prompt, (70,) * int(prompt.prompt_id[1:]), draw=draw)


class Writer:
    """Its answer is always four letters and an end."""

    info = TeacherInfo("writer", 9, (Offer("text"),), takes_text=True)

    async def complete(self, prompts, sampling):
        async for prompt in prompts:
            yield Completion(prompt, (1,), "abcd", "stop")


def game(judge=None, count: int = 5):
    discriminator = Discriminator(tiny_llama(vocab_size=262), train=TrainConfig(), learning_rate=1e-3)
    teacher = WritingTeacher(Writer(), tiny_tokenizer(), Sampling(9), max_seq_len=40, shares_ids=False)
    engine = Engine()
    options = {"engine": engine, "teacher": teacher, "discriminator": discriminator, "judge": judge}
    sampling = Sampling(12, temperature=0.8, seed=3)
    return HeldOutGame(PROMPTS, count, sampling=sampling, decode=lambda ids: "x" * len(ids), **options), discriminator, engine


async def test_figures_are_of_both_answers_to_the_same_held_out_prompts():
    played, discriminator, engine = game()
    found = await played.measure()
    chosen = [PROMPTS[index] for index in (1, 3, 5, 7)]  # of 0, 1, 3, 5 and 7, the student has nothing to say to the first
    answer = (*tiny_tokenizer()("abcd")["input_ids"], 2)
    contests = [Contest(prompt.token_ids, answer, ((70,) * int(prompt.prompt_id[1:]),)) for prompt in chosen]
    scores = discriminator.score(contests, seed=1)
    assert found["discriminator_accuracy"] == scores.accuracy()
    assert found["discriminator_margin"] == pytest.approx(float(scores.margins.mean()), rel=1e-4, abs=1e-6)
    assert (found["student_length_mean"], found["teacher_length_mean"]) == (4.0, 5.0)
    assert found["length_drift"] == pytest.approx(-0.2)
    assert "win_rate" not in found
    await played.measure()
    assert engine.sampling[0] == engine.sampling[1], "the same seed at every stage"
    assert (engine.sampling[0].temperature, engine.sampling[0].max_new_tokens) == (0.8, 12)


async def test_a_judge_sees_the_request_and_both_answers():
    judge = Judge(longer)
    found = await game(judge)[0].measure()
    assert found["win_rate"] == pytest.approx((0 + 0 + 0.5 + 1) / 4), "lengths 1, 3, 5 and 7 against 5"
    assert (found["win_rate_pairs"], found["win_rate_unread"]) == (4, 0)
    assert found["standard_errors"]["win_rate"] > 0
    assert any("say 3" in text for text in judge.asked)
    assert (
        await HeldOutGame([], 5, engine=Engine(), teacher=None, discriminator=None, sampling=Sampling(4), decode=str, judge=judge).measure()
        == {}
    )
