"""What people have exported from a page, held to its key before it is believed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbopd.errors import DataError
from bbopd.evaluate.human.comparisons import SIDES, Key

QUESTIONS = ("fluency", "correctness")
SCORES = range(1, 6)
_FORMAT = "bbopd human ratings 1"
_PREFERENCES = {"A": 1.0, "tie": 0.5, "B": 0.0}


@dataclass(frozen=True, slots=True)
class Rating:
    """One person on one pair. ``preference``: 1 where side A is better, 0.5 for a tie; ``scores``: by question, of side A and B, 1 to 5."""

    rater: str
    item_id: str
    preference: float
    scores: Mapping[str, tuple[int, int]]


def read_ratings(paths: Sequence[str | Path], key: Key) -> list[Rating]:
    """All ratings in the exports of one page.

    Raises
    ------
    DataError
        A file is no export, belongs to another page, or holds a value that the page cannot give; two files are of one person; no
        pair was rated at all.
    """
    files: dict[str, Path] = {}
    ratings: list[Rating] = []
    for path in map(Path, paths):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"its format is {content['format']!r}, not {_FORMAT!r}")
            page, rater, lines = str(content["page"]), str(content["rater"]), list(content["ratings"])
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror or error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is not an export of the page ({error}): give the file that its Export button saves") from error
        if page != key.page_id:
            raise DataError(f"{path} rates page {page}, the key is of page {key.page_id}: give the key that was written with that page")
        if rater in files:
            raise DataError(f"{files[rater]} and {path} are both of {rater!r}: give the later one alone, or rename one of two people")
        files[rater] = path
        found = [_rating(path, rater, line, key) for line in lines]
        if len({rating.item_id for rating in found}) < len(found):
            raise DataError(f"{path} rates a pair twice: export it again from the page")
        ratings += found
    if not ratings:
        raise DataError(f"no pair is rated in {', '.join(map(str, paths))}: a rating counts once all its questions are answered")
    return ratings


def _rating(path: Path, rater: str, line: Any, key: Key) -> Rating:
    try:
        item_id, preference = line["item"], _PREFERENCES[line["preference"]]
        scores = {question: (line["A"][question], line["B"][question]) for question in QUESTIONS}
    except (KeyError, TypeError) as error:
        raise DataError(f"{path}: a rating is incomplete or not the page's own ({error}): {json.dumps(line)[:200]}") from error
    if item_id not in key.models:
        raise DataError(f"{path} rates item {item_id!r}, which the key does not know: the file was changed, or belongs to another page")
    for question, values in scores.items():
        for side, value in zip(SIDES, values, strict=True):
            if type(value) is not int or value not in SCORES:
                raise DataError(f"{path}: item {item_id} has {question} {value!r} for side {side}: a score is a whole number from 1 to 5")
    return Rating(rater, item_id, preference, scores)
