"""Rewards from a teacher that only grades: what it is asked, what is read, and what becomes of replies that are no grades."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest

from bbopd.config_grading import GradingConfig
from bbopd.errors import BadAnswerError, DataError, TeacherError
from bbopd.teachers.answer_store import AnswerStore
from bbopd.teachers.cache import CachedTeacher
from bbopd.teachers.verbal import VerbalJudge
from bbopd.types import Completion, Offer, Prompt, Reward, Rollout, Sampling, TeacherInfo, Unscored
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
Messages = tuple[tuple[str, str], ...]


class Grader:
    """A teacher whose replies are a function of the messages; the last asked is answered first."""

    def __init__(self, grade: Callable[[Messages], str], *, finish_reason="stop", takes_text=True) -> None:
        self.info = TeacherInfo("grader", 0, (Offer("text", 0, 0.01, 2.0, "none"),), takes_text=takes_text, revision="1")
        self.asked: list[Messages] = []
        self._grade, self._finish_reason = grade, finish_reason

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        for prompt in reversed([prompt async for prompt in prompts]):
            self.asked.append(prompt.messages)
            yield Completion(prompt, (), self._grade(prompt.messages), self._finish_reason)

    def score(self, rollouts, want):
        raise NotImplementedError


def answer(text: str, prompt: Prompt | None = None, draw: int = 0) -> Rollout:
    prompt = prompt or Prompt("p", tuple(TOKENIZER("the question")["input_ids"]))
    return Rollout(f"{prompt.prompt_id}#{draw}", prompt, (*TOKENIZER(text)["input_ids"], 2), draw=draw)


def grading(**changes) -> GradingConfig:
    return GradingConfig(**{"criteria": ({"text": "Is it long?"},), "scale": (0, 10), **changes})


def length_of(messages: Messages) -> int:
    return len(messages[0][1].split("<answer>\n")[1].split("\n</answer>")[0])


def judge(teacher, settings: GradingConfig | None = None) -> VerbalJudge:
    return VerbalJudge(teacher, TOKENIZER, settings or grading(), Sampling(16))


async def test_each_answer_has_its_own_grade_and_the_same_text_is_graded_once() -> None:
    teacher = Grader(lambda messages: f"score: {length_of(messages)}")
    group = [answer(text, draw=n) for n, text in enumerate(["in", "thing", "in", "then"])]
    asked = judge(teacher)
    assert await asked.rewards(group) == [Reward(value / 10, {"score": value / 10}) for value in (2, 5, 2, 4)]
    assert len(teacher.asked) == 3
    assert all("<question>\nthe question\n</question>" in messages[0][1] for messages in teacher.asked)
    assert asked.counters == {"grades": 3, "bad_grades": 0}


async def test_the_reward_is_the_weighted_mean_of_the_criteria() -> None:
    settings = grading(criteria=({"name": "a", "text": "x", "weight": 1}, {"name": "b", "text": "y", "weight": 3}))
    (reward,) = await judge(Grader(lambda messages: '{"b": 4, "a": 8}'), settings).rewards([answer("in")])
    assert reward.parts == {"a": 0.8, "b": 0.4}
    assert reward.value == pytest.approx((0.8 + 3 * 0.4) / 4)


async def test_questions_are_shown_as_they_were_asked_and_references_where_wanted() -> None:
    ids = tuple(TOKENIZER("the")["input_ids"])
    one = Prompt("one", ids, ids, messages=(("user", "in?"),))
    several = Prompt("several", ids, ids, messages=(("system", "be"), ("user", "in?")))
    text = Prompt("text", ids, ids, text="out of it")
    teacher = Grader(lambda messages: "score: 1")
    for prompt in (one, several, text):
        await judge(teacher, grading(show_reference=True)).rewards([answer("in", prompt)])
    shown = [messages[0][1] for messages in teacher.asked]
    for message, question in zip(shown, ("in?", "system: be\nuser: in?", "out of it"), strict=True):
        assert f"<question>\n{question}\n</question>" in message
        assert "<reference>\nthe\n</reference>" in message
    with pytest.raises(DataError, match=r"prompt p has no reference answer to show"):
        await judge(teacher, grading(show_reference=True)).rewards([answer("in")])


async def test_a_reply_that_is_no_grade_is_answered_with_what_is_wrong_and_asked_for_again() -> None:
    def grade(messages: Messages) -> str:
        return ["Very good!", "", "score: 7"][len(messages) // 2]

    teacher = Grader(grade)
    asked = judge(teacher)
    assert await asked.rewards([answer("in")]) == [Reward(0.7, {"score": 0.7})]
    assert asked.counters == {"grades": 3, "bad_grades": 2}
    last = teacher.asked[-1]
    assert [role for role, _ in last] == ["user", "assistant", "user", "assistant", "user"]
    assert last[1] == ("assistant", "Very good!")
    assert "That reply cannot be used: 'Very good!' is not the form asked for" in last[2][1]
    assert last[3] == ("assistant", "(nothing)")


@pytest.mark.parametrize("finish_reason", ["stop", "length"])
async def test_who_gets_no_grade_is_unscored_or_ends_the_run(finish_reason) -> None:
    def grade(messages: Messages) -> str:
        return "score: 3" if finish_reason == "length" or length_of(messages) < 3 else "hm"

    teacher = Grader(grade, finish_reason=finish_reason)
    good, bad = answer("in"), answer("thing", draw=1)
    said = await judge(teacher).rewards([bad, good])
    assert isinstance(said[0], Unscored)
    assert (said[0].rollout, said[0].reason) == (bad, "ungraded")
    expected = "cut off after 16 tokens" if finish_reason == "length" else "'hm' is not the form asked for"
    assert "no grade for rollout p#1 in 3 tries, at last: " in said[0].detail
    assert expected in said[0].detail
    assert isinstance(said[1], Reward) == (finish_reason == "stop")
    assert len(teacher.asked) == (4 if finish_reason == "stop" else 6), "only what has no grade is asked again"
    with pytest.raises(BadAnswerError, match=r"in 1 tries, at last: .*; reword teacher.grading, or set"):
        await judge(Grader(lambda messages: "hm"), grading(on_bad_grade="stop", retries=0)).rewards([bad])


async def test_what_was_graded_once_is_not_asked_again_bad_replies_included(tmp_path) -> None:
    def grade(messages: Messages) -> str:
        return "hm" if len(messages) == 1 and length_of(messages) > 3 else "score: 3"

    teacher, group = Grader(grade), [answer("in"), answer("thing", draw=1)]
    for _ in range(2):
        cached = CachedTeacher(teacher, AnswerStore(tmp_path / "answers.db"))
        assert [reward.value for reward in await judge(cached).rewards(group)] == [0.3, 0.3]
        assert len(teacher.asked) == 3
        await cached.close()
    other = CachedTeacher(teacher, AnswerStore(tmp_path / "answers.db"))
    await judge(other, grading(criteria=({"text": "Is it brief?"},))).rewards(group)
    assert len(teacher.asked) == 6, "another rubric is another question"
    await other.close()


def test_a_teacher_that_takes_no_text_cannot_grade() -> None:
    with pytest.raises(TeacherError, match="takes no messages"):
        judge(Grader(lambda messages: "", takes_text=False))
