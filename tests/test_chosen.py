"""The best of several answers of a teacher, or none: by every measure, kept for a prompt that comes again, paid for once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bbopd.cli.execute import execute
from bbopd.config_teacher import AnswersConfig
from bbopd.data.hooks import load_score
from bbopd.data.streams import each
from bbopd.errors import BudgetSpentError, ConfigError, DataError, TeacherError
from bbopd.pipeline.answer_scores import grades, own_score, student_logprob
from bbopd.pipeline.cycle import as_labelled
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.chosen import Answer, ChoosingTeacher, teacher_logprob
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.written import WritingTeacher
from bbopd.types import Completion, Offer, Prompt, Reward, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, Unscored
from tests.openai_runs import run_config, served
from tests.openai_server import CHAT, OpenAIServer
from tests.tiny_models import tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.timeout(600)
TOKENIZER = tiny_tokenizer()
TEXT = SignalSpec("text")


class Many:
    """Writes the prompt's name as often as the seed says, the last prompt first; may fail at one seed."""

    def __init__(self, *, fails_at: int = -1) -> None:
        self.info = TeacherInfo("many", 0, (Offer("text", 0, 0.01, 2.0, "none"),), takes_text=True, revision="1")
        self.asked: Counter[tuple[str, int]] = Counter()
        self.finished = 0
        self._fails_at = fails_at

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        if sampling.seed == self._fails_at:
            raise BudgetSpentError("the money is spent")
        for prompt in reversed([prompt async for prompt in prompts]):
            await asyncio.sleep(0.001)
            self.asked[prompt.prompt_id, sampling.seed] += 1
            text = f"{prompt.prompt_id} " * sampling.seed
            yield Completion(prompt, tuple(range(sampling.seed)), text, "stop", (-0.5 * sampling.seed,) * sampling.seed)
        self.finished += 1

    def score(self, rollouts, want):
        raise NotImplementedError


def choosing(teacher, scores, *, samples: int = 4, **options) -> ChoosingTeacher:
    writing = WritingTeacher(teacher, TOKENIZER, Sampling(64, seed=1), max_seq_len=64, shares_ids=False)
    return ChoosingTeacher(writing, scores, samples=samples, **options)


def labelled(*names: str) -> list[Rollout]:
    prompts = [Prompt(name, tuple(TOKENIZER(f"the {name}")["input_ids"]), (2,)) for name in names]
    return [as_labelled(prompt, draw=number) for number, prompt in enumerate(prompts)]


async def chosen(stage: ChoosingTeacher, *names: str) -> list[ScoredRollout | Unscored]:
    return [one async for one in stage.score(each(labelled(*names)), TEXT)]


def by(value):
    """A score of the answer's text alone."""

    async def scores(answers: Sequence[Answer]) -> Sequence[float | None]:
        return [value(answer.completion.text) for answer in answers]

    return scores


def near_three(text: str) -> float:
    return 0.0 - abs(len(text.split()) - 3.0)


async def test_the_best_is_kept_and_the_same_one_whenever_its_prompt_comes_again() -> None:
    teacher = Many()
    stage = choosing(teacher, by(near_three))
    first = await chosen(stage, "a", "b", "a")
    assert [TOKENIZER.decode(one.rollout.token_ids, skip_special_tokens=True) for one in first] == ["a " * 3, "b " * 3, "a " * 3]
    assert [one.rollout.draw for one in first] == [0, 1, 2]
    assert all(one.rollout.origin == "teacher" and one.rollout.token_ids[-1] == 2 and one.reward == Reward(0.0) for one in first)
    assert first[0].group_std == pytest.approx(np.std([-2, -1, 0, -1], ddof=1))
    assert teacher.asked == {(name, seed): 1 for name in "ab" for seed in (1, 2, 3, 4)}
    again = await chosen(stage, "b", "c")
    assert again[0].rollout.token_ids == first[1].rollout.token_ids
    assert sum(teacher.asked.values()) == 12
    assert stage.counters == {"answers": 12, "prompts_without_answer": 0}


async def test_of_equal_scores_the_first_is_kept() -> None:
    (one,) = await chosen(choosing(Many(), by(lambda text: 1.0)), "a")
    assert TOKENIZER.decode(one.rollout.token_ids, skip_special_tokens=True) == "a "
    assert one.group_std == 0.0


async def test_a_prompt_without_an_answer_that_will_do_is_unscored() -> None:
    stage = choosing(Many(), by(lambda text: None if "none" in text else float(len(text.split()))), min_score=4.0)
    good, bad = await chosen(stage, "a", "none")
    assert isinstance(good, ScoredRollout)
    assert isinstance(bad, Unscored)
    assert (bad.reason, bad.detail) == ("low_score", "of 4 answers of the teacher none of them will do")
    (low,) = await chosen(choosing(Many(), by(near_three), min_score=0.5), "a")
    assert low.detail == "of 4 answers of the teacher the best has 0, teacher.answers.min_score is 0.5"
    assert stage.counters == {"answers": 8, "prompts_without_answer": 1}
    with pytest.raises(TeacherError, match="none of the last 256 prompts has an answer that will do"):
        await chosen(stage, *["none"] * 300)


async def test_every_answer_is_kept_by_itself_and_asked_once(tmp_path: Path) -> None:
    teacher = Many()
    for samples, asked in ((3, 6), (3, 6), (5, 10)):
        cached = CachedTeacher(teacher, AnswerStore(tmp_path / "answers.db"))
        await chosen(choosing(cached, by(near_three), samples=samples), "a", "b")
        assert sum(teacher.asked.values()) == asked
        await cached.close()


async def test_when_the_money_is_spent_the_other_answers_come_to_their_end() -> None:
    teacher = Many(fails_at=2)
    with pytest.raises(BudgetSpentError):
        await chosen(choosing(teacher, by(near_three)), "a", "b")
    assert teacher.finished == 3


# ------------------------------------------------------------ the measures


async def test_the_teacher_says_how_likely_its_own_words_were() -> None:
    (one,) = await chosen(choosing(Many(), teacher_logprob), "a")
    assert one.reward == Reward(-0.5)
    silent = Completion(Prompt("p", ()), (1, 2), "x", "stop")
    with pytest.raises(TeacherError, match=r"does not say how likely its answer to prompt p was"):
        await teacher_logprob([Answer(silent, labelled("p")[0])])


async def test_the_student_says_what_it_holds_most_likely() -> None:
    model = tiny_llama(262, seed=5)
    scores = student_logprob(model, compute_dtype=torch.float32, vocab_size=262)
    rollouts = labelled("a", "b", "c")
    answers = [
        Answer(Completion(one.prompt, (), "", "stop"), Rollout("r", one.prompt, ids))
        for one, ids in zip(rollouts, ((5,), (9, 70, 2), (8, 8)), strict=True)
    ]
    expected = []
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([answer.rollout.all_ids])).logits[0, len(answer.rollout.prompt.token_ids) - 1 : -1].double()
        expected.append(logits.log_softmax(-1).gather(1, torch.tensor(answer.rollout.token_ids)[:, None]).mean().item())
    assert await scores(answers) == pytest.approx(expected, abs=1e-5)


async def test_a_judge_grades_and_what_it_cannot_judge_will_not_do() -> None:
    class Words:
        async def rewards(self, group):
            return [Unscored(one, "ungraded") if len(one) == 2 else Reward(float(len(one))) for one in group]

    answers = [Answer(Completion(Prompt("p", ()), (), "", "stop"), Rollout("r", Prompt("p", (1,)), (1,) * n)) for n in (1, 2, 3)]
    assert await grades(Words())(answers) == [1.0, None, 3.0]


OWN = """
def brief(prompt, text):
    return None if "bad" in text else -len(text) - len(prompt.prompt_id)
def odd(prompt, text):
    return text
def broken(prompt, text):
    return 1 / 0
"""


async def test_a_score_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    texts = ("abc", "bad", "ab")
    answers = [Answer(Completion(Prompt("p", ()), (), text, "stop"), Rollout("r", Prompt("p", (1,)), (1,))) for text in texts]
    assert await own_score(f"{tmp_path}/own.py:brief")(answers) == [-4.0, None, -3.0]
    for name, error in (
        ("odd", r"returned 'x' for an answer to prompt p: expected a number"),
        ("broken", "failed on an answer to prompt p: ZeroDivision"),
    ):
        with pytest.raises(DataError, match=error):
            load_score(f"{tmp_path}/own.py:{name}", "teacher.answers.best_by")(Prompt("p", ()), "x")
    with pytest.raises(ConfigError, match=r"teacher.answers.best_by: .* there is no 'nothing'"):
        own_score(f"{tmp_path}/own.py:nothing")


# ------------------------------------------------------------ a run


def test_a_run_learns_the_best_of_what_an_endpoint_writes(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def score(prompt, text):\n    return -float(len(text)) if len(text) % 2 else None\n")
    backend = HFBackend(tiny_llama(vocab_size=262, seed=1), TOKENIZER, name="tiny")
    server = OpenAIServer(backend, encode=lambda text: TOKENIZER(text)["input_ids"], ways=[CHAT])
    answers = {"max_new_tokens": 10, "samples": 3, "best_by": f"{tmp_path}/own.py:score", "min_score": -12.0}
    with served(server) as port:
        config = run_config(
            tmp_path,
            port,
            teacher={"signal": "text", "answers": answers, "budget": {"limit": 1.0}},
            objective={"name": "seqkd"},
            train={"labelled_tokens": 100},
        )
        assert execute(config, plain=True) == 0
    run = tmp_path / "run"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rejected = [json.loads(line) for line in (run / "rejected.jsonl").read_text().splitlines()]
    asked = Counter(json.dumps([body["messages"], body["seed"]]) for path, body in server.requests if path.endswith("chat/completions"))
    assert set(asked.values()) == {1}
    assert lines[-1]["cache_misses"] == len(asked)
    assert lines[-1]["answers"] % 3 == 0
    assert lines[-1]["answers"] >= len(asked) > 0, "two windows of the same text are one question"
    assert all(-12.0 <= line["reward_mean"] < 0 for line in lines)
    assert {entry["reason"] for entry in rejected} <= {"low_score"}
    assert json.loads((run / "summary.json").read_text())["rejected"].get("low_score", 0) == len(rejected)
    assert lines[-1]["prompts_without_answer"] <= len(rejected)


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ({"samples": 2}, "need best_by"),
        ({"min_score": 0.0}, "need best_by"),
        ({"samples": 2, "best_by": "student", "top_k": 1}, "the same answer each time"),
        ({"samples": 2, "best_by": "best"}, "pattern"),
    ],
)
def test_a_choice_without_a_measure_is_refused(answers, error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        AnswersConfig(**answers)


def test_a_choice_is_for_those_who_learn_from_answers(tmp_path: Path) -> None:
    rubric = {"criteria": [{"text": "x"}]}
    for teacher, objective, error in (
        ({"signal": "full", "answers": {"best_by": "student"}}, {}, "chooses among the teacher's answers"),
        ({"signal": "text", "answers": {"best_by": "grade"}}, {"name": "seqkd"}, "without teacher.grading"),
        ({"signal": "text", "answers": {"best_by": "student"}, "grading": rubric}, {"name": "seqkd"}, "with teacher.grading"),
    ):
        with pytest.raises(ValidationError, match=error):
            run_config(tmp_path, 1, teacher=teacher, objective=objective, train={"labelled_tokens": 9})
