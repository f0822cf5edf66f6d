"""What a grading teacher is asked and what counts as a grade: nothing but the one form that was asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from bbopd.config_grading import GRADING_FIELDS, GradingConfig

__all__ = ["read_grades", "render", "wanted_form"]

_SHOWN = 200  # characters of a bad reply in an error
_VERDICTS = {"yes": 1.0, "no": 0.0}
_FIELD = re.compile(r"\{(" + "|".join(GRADING_FIELDS) + r")\}")


def render(grading: GradingConfig, question: str, answer: str, reference: str | None) -> str:
    """The message that asks for the grades of ``answer``. Braces in what is filled in stay what they are."""
    shown = "" if reference is None else f"\nA reference answer:\n<reference>\n{reference}\n</reference>\n"
    fields = {"question": question, "answer": answer, "reference": shown, "rubric": _rubric(grading), "form": wanted_form(grading)}
    return _FIELD.sub(lambda field: fields[field[1]], grading.template)


def wanted_form(grading: GradingConfig) -> str:
    """The reply that is wanted, in words."""
    grade = "yes or no" if grading.scale == "verdict" else f"a number from {grading.scale[0]:g} to {grading.scale[1]:g}"
    names = [criterion.name for criterion in grading.criteria]
    if len(names) == 1:
        return f"Reply with this one line and nothing else, x being {grade}:\n{names[0]}: x"
    x = '"x"' if grading.scale == "verdict" else "x"
    keys = ", ".join(f'"{name}": {x}' for name in names)
    return f"Reply with this one JSON object and nothing else, each x being {grade}:\n{{{keys}}}"


def read_grades(grading: GradingConfig, reply: str) -> dict[str, float]:
    """Of every criterion the place of its grade on the scale, 0 to 1.

    Raises
    ------
    ValueError : the reply is anything but one JSON object with a grade for each criterion, or, for a single one, a line ``name: x``.
    """
    text, names = reply.strip(), [criterion.name for criterion in grading.criteria]
    line = re.fullmatch(rf"{names[0]}:[ \t]*(\S+)", text) if len(names) == 1 else None
    given: Mapping[str, Any]
    if line is not None:
        given = {names[0]: line[1] if grading.scale == "verdict" else _number(line[1])}
    else:
        given = _json_object(text)
    if set(given) != set(names):
        raise ValueError(
            f"it grades {', '.join(map(repr, given)) or 'nothing'}, asked for were the grades of {', '.join(map(repr, names))}"
        )
    return {name: _place(grading, name, given[name]) for name in names}


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_each_once)
    except RecursionError:
        found = None
    except ValueError as error:
        raise ValueError(f"{_shown(text)} is not the form asked for ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{_shown(text)} is not the form asked for")
    return found


def _place(grading: GradingConfig, name: str, grade: Any) -> float:
    if grading.scale == "verdict":
        if not isinstance(grade, str) or grade.lower() not in _VERDICTS:
            raise ValueError(f"{name} is {_shown(grade)}, which is neither yes nor no")
        return _VERDICTS[grade.lower()]
    low, high = grading.scale
    if isinstance(grade, bool) or not isinstance(grade, int | float) or not math.isfinite(grade) or not low <= grade <= high:
        raise ValueError(f"{name} is {_shown(grade)}, which is no number from {low:g} to {high:g}")
    return float((grade - low) / (high - low))


def _number(text: str) -> float | str:
    return float(text) if re.fullmatch(r"[+-]?[0-9]+(\.[0-9]+)?", text) else text


def _rubric(grading: GradingConfig) -> str:
    return "\n".join(f"- {criterion.name}: {criterion.text}" for criterion in grading.criteria)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
