"""What is a grade and what is none, and the message that asks for one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from bbopd.config_grading import GradingConfig
from bbopd.teachers.grades import read_grades, render, wanted_form

ONE = GradingConfig(criteria=({"text": "Is it true?"},))
TWO = GradingConfig(
    criteria=({"name": "truth", "text": "Is it true?"}, {"name": "style", "text": "Is it brief?", "weight": 3}), scale=(0, 4)
)
VERDICT = GradingConfig(criteria=({"name": "truth", "text": "Is it true?"}, {"name": "style", "text": "Is it brief?"}), scale="verdict")
SINGLE_VERDICT = GradingConfig(criteria=({"text": "Is it true?"},), scale="verdict")


@pytest.mark.parametrize(
    ("grading", "reply", "grades"),
    [
        (ONE, "score: 10", {"score": 1.0}),
        (ONE, "  score:1\n", {"score": 0.0}),
        (ONE, "score: 5.5", {"score": 0.5}),
        (ONE, '{"score": 5.5}', {"score": 0.5}),
        (TWO, '{"truth": 1, "style": 4}', {"truth": 0.25, "style": 1.0}),
        (TWO, ' {"style": 4.0,\n "truth": 0}\n', {"truth": 0.0, "style": 1.0}),
        (VERDICT, '{"truth": "yes", "style": "No"}', {"truth": 1.0, "style": 0.0}),
        (SINGLE_VERDICT, "score: yes", {"score": 1.0}),
    ],
)
def test_grades_are_places_on_the_scale(grading: GradingConfig, reply: str, grades: dict[str, float]) -> None:
    assert read_grades(grading, reply) == grades


@pytest.mark.parametrize(
    ("grading", "reply", "error"),
    [
        (ONE, "", "not the form"),
        (ONE, "I think it is good. score: 7", "not the form"),
        (ONE, "score: 7\nIt is good.", "not the form"),
        (ONE, "score: 7/10", "no number from 1 to 10"),
        (ONE, "score: 11", "no number from 1 to 10"),
        (ONE, "score: 0.99", "no number from 1 to 10"),
        (ONE, "score: nan", "no number"),
        (ONE, "score: 1e1", "no number"),
        (ONE, "Score: 7", "not the form"),
        (ONE, "7", "not the form"),
        (ONE, '"score: 7"', "not the form"),
        (ONE, '{"score": true}', "True, which is no number"),
        (ONE, '{"score": "7"}', "'7', which is no number"),
        (ONE, '{"score": NaN}', "NaN is no number"),
        (ONE, '{"score": 1, "score": 9}', "a key comes twice"),
        (ONE, '{"score": 1}{"score": 9}', "not the form"),
        (ONE, '```json\n{"score": 1}\n```', "not the form"),
        (ONE, "[" * 100_000, "not the form"),
        (TWO, "truth: 3", "not the form"),
        (TWO, '{"truth": 3}', "asked for were the grades of 'truth', 'style'"),
        (TWO, '{"truth": 3, "style": 2, "wit": 1}', "'wit', asked for"),
        (TWO, '{"truth": 3, "style": null}', "None, which is no number"),
        (TWO, "[3, 2]", "not the form"),
        (VERDICT, '{"truth": true, "style": "yes"}', "neither yes nor no"),
        (SINGLE_VERDICT, "score: maybe", "neither yes nor no"),
    ],
)
def test_anything_else_is_no_grade(grading: GradingConfig, reply: str, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_grades(grading, reply)


@pytest.mark.parametrize("grading", [ONE, TWO, VERDICT, SINGLE_VERDICT])
def test_the_form_that_is_asked_for_is_one_that_is_read(grading: GradingConfig) -> None:
    reply = wanted_form(grading).split("\n")[-1]
    filled = reply.replace('"x"', '"yes"').replace(": x", ": yes" if grading.scale == "verdict" else ": 4")
    assert set(read_grades(grading, filled)) == {criterion.name for criterion in grading.criteria}


def test_braces_in_what_is_filled_in_stay_what_they_are() -> None:
    message = render(TWO, "What is {answer}?", "{rubric} {form}", "{question}")
    assert "<question>\nWhat is {answer}?\n</question>" in message
    assert "<answer>\n{rubric} {form}\n</answer>" in message
    assert "<reference>\n{question}\n</reference>" in message
    assert "- truth: Is it true?\n- style: Is it brief?" in message
    assert "reference" not in render(TWO, "q", "a", None)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"criteria": ()}, "at least 1"),
        ({"criteria": ({"text": "a"}, {"text": "b"})}, "names of their own"),
        ({"criteria": ({"text": "a", "weight": 0},)}, "greater than 0"),
        ({"criteria": ({"name": "A b", "text": "a"},)}, "pattern"),
        ({"scale": (3, 3)}, r"scale \[3.0, 3.0\] must rise"),
        ({"template": "{question} {answer} {rubric}"}, r"template has no \{form\}"),
        ({"template": "{question} {answer} {rubric} {form}", "show_reference": True}, r"template has no \{reference\}"),
    ],
)
def test_a_rubric_that_cannot_be_asked_is_refused(changes, error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        GradingConfig(**{"criteria": ({"text": "a"},), **changes})
