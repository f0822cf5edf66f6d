"""Filters that read text: characters, languages, hooks and near-duplicates, on real text and on answers made for them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbopd.config import FiltersConfig
from bbopd.data.demo_chat import CHAT_PROMPTS
from bbopd.data.demo_text import demo_topics
from bbopd.data.filters import RolloutFilter
from bbopd.data.near_duplicates import AcceptedAnswers, NearDuplicates
from bbopd.data.rejected import Rejection
from bbopd.data.text_checks import text_checks
from bbopd.errors import ConfigError, DataError
from bbopd.extras import need
from bbopd.types import Prompt, Rollout

OTHER_LANGUAGES = {
    "de": "Der Kühlschrank hält das Essen kalt, weil ein Kältemittel die Wärme nach außen trägt und dort wieder abgibt.",
    "fr": "Pour enlever une tache de café, il faut d'abord rincer la chemise à l'eau froide, puis la laver comme d'habitude.",
    "es": "Antes de alquilar un piso conviene mirar las ventanas, la calefacción y el contrato con mucha atención.",
    "ru": "Хлеб быстрее черствеет в холодильнике, потому что крахмал при такой температуре кристаллизуется скорее.",
    "zh": "面包在冰箱里变硬得更快，因为淀粉在低温下更容易重新结晶。",
}


def rollout(draw: int = 0, weights_version: int = 0) -> Rollout:
    return Rollout(f"p#{draw}", Prompt("p", (9,)), (1, 2, 3, 4), draw=draw, weights_version=weights_version)


def judge(text: str, **filters: object) -> Rejection | None:
    config = FiltersConfig.model_validate(filters)
    return RolloutFilter(config, [0], decode=lambda ids: text, text_checks=text_checks(config)).check(rollout())


def pieces(size: int, count: int) -> list[str]:
    """Runs of ``size`` characters from the middle of Python's own help."""
    return [text[len(text) // 2 :][:size] for text in demo_topics().values() if len(text) > 2 * size][:count]


# ---------------------------------------------------------------- characters


@pytest.mark.parametrize(
    ("text", "charset", "share"),
    [
        ("plain words, 3 of them: naïve café — 100 % 😀\n\tdone", ("Latin",), 0),
        ("half Latin, половина нет", ("Latin",), 11 / 24),
        ("half Latin, половина нет", ("Latin", "Cyrillic"), 0),
        ("broken \ufffd bytes \ufffd here", ("Latin",), 2 / 21),
        ("broken \ufffd bytes \ufffd here", ("any",), 2 / 21),
        ("любое 什么 any\x07", ("any",), 1 / 13),
        ("none \u0378, private \ue000", ("any",), 2 / 17),
        ("naïve", ("ascii",), 1 / 5),
        ("naive\r\n", ("ascii",), 0),
        ("", ("Latin",), 0),
    ],
)
def test_share_of_foreign_characters(text: str, charset: tuple[str, ...], share: float) -> None:
    rejection = judge(text, charset=charset, max_foreign=0.0)
    assert (rejection.figure if rejection else 0) == pytest.approx(share, abs=1e-4)
    if rejection is not None:
        assert (rejection.reason, rejection.limit) == ("charset", 0.0)
        assert "U+" in rejection.detail
        assert judge(text, charset=charset, max_foreign=share + 1e-9) is None


# ---------------------------------------------------------------- languages


def test_languages_of_real_text() -> None:
    english = pieces(200, 60)
    assert len(english) >= 40
    turned_away = [text for text in english if judge(text, languages=("en",))]
    assert len(turned_away) <= len(english) // 20  # help with much code in it may look like anything
    assert not [text for text in CHAT_PROMPTS if len(text) > 60 and judge(text, languages=("en",))]
    for code, text in OTHER_LANGUAGES.items():
        rejection = judge(text, languages=("en",))
        assert rejection is not None
        assert (rejection.reason, rejection.limit) == ("language", 0.1)
        assert rejection.detail.startswith(f"most likely {code} (")
        assert judge(text, languages=("en", code)) is None
    assert judge("42.", languages=("en",)) is None  # too little to tell


# ---------------------------------------------------------------- hooks


def test_hooks_from_a_file_and_from_a_module(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Note:\n    text: str\n"
        "def no_shouting(rollout, text):\n"
        "    return Note('all capitals in ' + rollout.rollout_id).text if text.isupper() else None\n"
        "def broken(rollout, text):\n    return 1 / 0\n"
        "def wrong(rollout, text):\n    return False\n"
    )
    assert judge("Quiet words.", hooks=(f"{path}:no_shouting",)) is None
    assert judge("LOUD WORDS.", hooks=(f"{path}:no_shouting",)) == Rejection("hook:no_shouting", detail="all capitals in p#0")
    assert judge("x", hooks=("tests.test_text_filters:accept_all", f"{path}:no_shouting")) is None
    with pytest.raises(DataError, match=r"own.py:broken failed on rollout p#0: ZeroDivisionError: division by zero"):
        judge("x", hooks=(f"{path}:broken",))
    with pytest.raises(DataError, match=r"returned False for rollout p#0: None accepts it, text says why not"):
        judge("x", hooks=(f"{path}:wrong",))


def accept_all(rollout: Rollout, text: str) -> str | None:
    return None


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"charset": ["Latn1"]}, "'Latn1' is no script of Unicode"),
        ({"languages": ["en", "english"]}, "english is not known: the codes are .* en .* zh"),
        ({"hooks": ["json:nothing"]}, "'json:nothing' names no function: there is no 'nothing' in json"),
        ({"hooks": ["nowhere.py:f"]}, "nowhere.py cannot be imported: FileNotFoundError"),
        ({"hooks": ["no_such_module:f"]}, "no_such_module cannot be imported: ModuleNotFoundError"),
        ({"hooks": ["function"]}, "'function' is neither module:function nor path.py:function"),
    ],
)
def test_a_filter_that_cannot_work_is_refused_by_name(filters: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        text_checks(FiltersConfig.model_validate(filters))


def test_a_library_that_is_missing_is_named_with_its_command() -> None:
    with pytest.raises(ConfigError, match=r"data.filters.languages needs the package no_such_library: pip install 'bbopd\[data\]'"):
        need("no_such_library.part", "data.filters.languages")


# ---------------------------------------------------------------- near-duplicates


def test_near_duplicates_of_real_text() -> None:
    texts = pieces(1200, 60)
    assert len(texts) >= 15
    near = NearDuplicates(0.7, None, "test")
    for index, text in enumerate(texts):
        assert near.find(text) is None, text
        near.add(str(index), text)
    for index, text in enumerate(texts):
        changed = text[:300].upper() + "  \n" + text[300:500] + "xyz" + text[503:] + " And so on."
        found = near.find(changed)
        assert found is not None
        assert found[0] == str(index)
        shingles = [
            {plain[i : i + 8] for i in range(len(plain) - 7)} for plain in (" ".join(t.casefold().split()) for t in (text, changed))
        ]
        assert found[1] == pytest.approx(len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1]), abs=0.18)  # four standard errors
    assert near.find(texts[0][:600]) is None  # half of it


def test_only_the_last_texts_are_remembered() -> None:
    texts = pieces(300, 12)
    near = NearDuplicates(0.9, 4, "test")
    for index, text in enumerate(texts):
        near.add(str(index), text)
    assert [near.find(text) is not None for text in texts] == [False] * 8 + [True] * 4


def test_accepted_answers_are_known_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "accepted.jsonl"
    first, second, third = pieces(500, 3)
    accepted = AcceptedAnswers(path, 0.8, keep=2)
    assert accepted.check_and_add(rollout(0, weights_version=3), first) is None
    repeated = accepted.check_and_add(rollout(1, weights_version=3), first + "!")
    assert repeated is not None
    assert (repeated.reason, repeated.limit, repeated.detail) == ("near_duplicate", 0.8, "of p#0")
    assert repeated.figure is not None
    assert repeated.figure >= 0.9
    assert accepted.check_and_add(rollout(0, weights_version=4), second) is None
    assert [accepted.check_and_add(rollout(draw), "Yes.") for draw in range(3)] == [None] * 3  # too short to be a copy
    accepted.close()
    with path.open("a") as file:
        file.write('{"rollout_id": "cut sho')
    again = AcceptedAnswers(path, 0.8, keep=2)
    assert again.check_and_add(rollout(), first) is not None
    assert again.check_and_add(rollout(), second) is not None
    assert again.check_and_add(rollout(5, weights_version=5), third) is None  # and the oldest is forgotten
    assert again.check_and_add(rollout(6, weights_version=6), first) is None
    again.close()
    AcceptedAnswers(path, 0.8, keep=2).close()
    assert [json.loads(line)["weights_version"] for line in path.read_text().splitlines()] == [5, 6]
    begun = AcceptedAnswers(path, 0.8, keep=2, pending=["p", "q"])  # the last answer to p is written again
    assert begun.check_and_add(rollout(), third) is not None
    assert begun.check_and_add(rollout(6, weights_version=6), first) is None
    begun.close()
    with pytest.raises(DataError, match=r"cannot use .*: Not a directory"):
        AcceptedAnswers(path / "below", 0.8, keep=2)
