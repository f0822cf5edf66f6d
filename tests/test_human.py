"""People as judges: what the page shows and hides, and that ratings come to what can be counted by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bbopd.cli.main import main
from bbopd.errors import ConfigError, DataError
from bbopd.evaluate.human.comparisons import Key, key_to_json, read_answers, read_key, read_prompts, shuffled_comparisons
from bbopd.evaluate.human.page import write_page
from bbopd.evaluate.human.raters import ordinal_alpha
from bbopd.evaluate.human.ratings import Rating, read_ratings
from bbopd.evaluate.human.results import collect, mean_over_prompts
from tests.human_ratings import Values, export
from tests.tiny_models import save_folder, tiny_llama

# Four observers, twelve units, some values missing: Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C.
OBSERVED = ("123321412...", "1233224125.3", ".3332342251.", "12332441251.")
HOSTILE = "</script><script>alert(1)</script><!-- \u2028 & <b>"


def answers(prompts: int, models: tuple[str, ...] = ("org/student", "org/teacher")) -> dict[str, dict[str, str]]:
    return {f"Question {number}?": {model: f"answer {number} {index}" for index, model in enumerate(models)} for number in range(prompts)}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_agreement_of_the_published_example() -> None:
    units = [[float(row[unit]) for row in OBSERVED if row[unit] != "."] for unit in range(12)]
    assert ordinal_alpha(units) == pytest.approx(0.815, abs=5e-4)


def test_agreement_at_its_ends() -> None:
    generator = np.random.default_rng(3)
    values = generator.integers(1, 6, size=4000)
    assert ordinal_alpha([(value, value) for value in values]) == 1.0
    by_chance = ordinal_alpha([(value, other) for value, other in zip(values, generator.permutation(values), strict=True)])
    assert by_chance == pytest.approx(0.0, abs=0.05)
    opposed = ordinal_alpha([(1, 5), (5, 1)] * 50)
    assert opposed is not None
    assert opposed < -0.9
    assert ordinal_alpha([(1,), (2,)]) is None, "nothing was rated twice"
    assert ordinal_alpha([(3, 3), (3, 3)]) is None, "nothing to agree on"


def test_sides_and_order_are_shuffled_evenly() -> None:
    found = shuffled_comparisons(answers(101), 7)
    assert len({item.item_id for item in found}) == 101
    assert [item.prompt for item in found] != list(answers(101))
    assert abs(Counter(item.models[0] for item in found)["org/student"] - 50.5) == 0.5
    for item in found:
        number = item.prompt.removeprefix("Question ").removesuffix("?")
        assert item.answers == tuple(f"answer {number} {int(model == 'org/teacher')}" for model in item.models)
    assert found == shuffled_comparisons(answers(101), 7)
    assert [item.models for item in found] != [item.models for item in shuffled_comparisons(answers(101), 8)]


def test_more_models_are_compared_in_pairs() -> None:
    found = shuffled_comparisons(answers(5, ("a", "b", "c")), 0, most=4)
    assert Counter(tuple(sorted(item.models)) for item in found) == {("a", "b"): 4, ("a", "c"): 4, ("b", "c"): 4}
    assert len({item.prompt for item in found}) == 4


def test_page_tells_no_name_fetches_nothing_and_runs_no_answer(tmp_path: Path) -> None:
    by_prompt = answers(3) | {HOSTILE: {"org/student": HOSTILE, "org/teacher": "fine"}}
    found = shuffled_comparisons(by_prompt, 0)
    files = write_page(tmp_path / "page.html", found)
    page = files.page.read_text(encoding="utf-8")
    assert "org/student" not in page
    assert "teacher" not in page
    assert "http" not in page.replace("http-equiv", "")
    assert not re.search(r"<(link|img|iframe)|src=|@import|fetch\(|XMLHttp", page)
    assert page.count("</script>") == 2, "an answer has ended its element"
    held = re.search(r'<script type="application/json" id="task">(.*?)</script>', page, re.DOTALL)
    assert held is not None
    shown = json.loads(held[1])["items"]
    assert [(item["id"], item["prompt"], tuple(item["answers"])) for item in shown] == [
        (item.item_id, item.prompt, item.answers) for item in found
    ]
    key = read_key(files.key)
    assert key.models == {item.item_id: item.models for item in found}
    assert json.loads(held[1])["page"] == key.page_id
    with pytest.raises(ConfigError, match="ratings may be made"):
        write_page(files.page, found)


def made(tmp_path: Path, prompts: int, models: tuple[str, ...] = ("a", "b")) -> Key:
    path = tmp_path / "made.key.json"
    path.write_text(json.dumps(key_to_json(shuffled_comparisons(answers(prompts, models), 1))), encoding="utf-8")
    return read_key(path)


def as_rated(key: Key, prompt: int, preferred: str | None, scores: dict[str, tuple[int, int]]) -> tuple[str, Values]:
    """What somebody who thinks so of a prompt's answers enters on the page, whatever the sides."""
    item = next(name for name, number in key.prompts.items() if number == prompt)
    first, second = key.models[item]
    return item, ("tie" if preferred is None else "AB"[preferred == second], scores[first], scores[second])


def test_ratings_become_the_figures_that_can_be_counted(tmp_path: Path) -> None:
    key = made(tmp_path, 4)
    ann = dict(as_rated(key, prompt, better, {"a": (5, 4), "b": (2, 3)}) for prompt, better in enumerate(("a", "a", None, "b")))
    bob = dict(as_rated(key, prompt, better, {"a": (4, 4), "b": (2, 1)}) for prompt, better in enumerate(("a", "b")))
    result = collect(read_ratings([export(tmp_path, key.page_id, "ann", ann), export(tmp_path, key.page_id, "bob", bob)], key), key)
    assert result.raters == {"ann": 4, "bob": 2}
    assert (result.items, result.rated_twice) == (4, 2)
    (won,) = result.win_rates
    assert (won.model, won.against, won.wins, won.ties, won.losses) == ("a", "b", 3, 1, 2)
    assert won.rate.value == pytest.approx(np.mean([1.0, 0.5, 0.5, 0.0])), "each prompt counts once, its raters together"
    assert won.rate.low is not None
    assert 0.0 <= won.rate.low < 0.5 < won.rate.high <= 1.0
    means = {(mean.model, mean.question): mean.score.value for mean in result.scores}
    assert means == pytest.approx(
        {
            ("a", "fluency"): (4.5 + 4.5 + 5 + 5) / 4,
            ("a", "correctness"): 4.0,
            ("b", "fluency"): 2.0,
            ("b", "correctness"): (2 + 2 + 3 + 3) / 4,
        }
    )
    assert result.agreement["preference"] == pytest.approx(ordinal_alpha([(1.0, 1.0), (1.0, 0.0)]))
    assert json.loads(json.dumps(result.to_json()))["win_rates"][0]["rate"]["prompts"] == 4


def test_preferences_follow_the_model_and_not_the_side() -> None:
    key = Key("p", {"x": 0, "y": 1}, {"x": ("b", "a"), "y": ("a", "b")})
    scores = {"fluency": (3, 3), "correctness": (3, 3)}
    ratings = [Rating("ann", item, 1.0, scores) for item in ("x", "y")]  # always side A
    result = collect(ratings, key)
    assert result.win_rates[0].rate.value == 0.5
    assert result.side_a.value == 1.0


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(11)
    inside = 0
    for _ in range(120):
        drawn = generator.binomial(1, 0.6, size=60)
        found = mean_over_prompts([(number, float(value)) for number, value in enumerate(drawn)])
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.6 <= found.high
    assert 104 <= inside <= 120  # 95% of 120 is 114
    assert mean_over_prompts([(0, 1.0), (0, 0.0)]).low is None


def test_exports_that_cannot_be_believed(tmp_path: Path) -> None:
    key = made(tmp_path, 2)
    rated = dict(as_rated(key, prompt, "a", {"a": (5, 4), "b": (2, 3)}) for prompt in range(2))
    good = export(tmp_path, key.page_id, "ann", rated)
    item = next(iter(rated))

    def bad(rater: str, ratings: dict[str, Values], page: str = key.page_id, **changes: Any) -> list[Path]:
        return [export(tmp_path, page, rater, ratings, **changes)]

    cases = {
        "rates page other": bad("b", rated, "other"),
        "both of 'ann'": [good, good],
        "does not know": bad("c", {"zzz": rated[item]}),
        "a whole number from 1 to 5": bad("d", {item: ("A", (6, 1), (1, 1))}),
        "incomplete": bad("e", {item: ("C", (1, 1), (1, 1))}),
        "no pair is rated": bad("f", {}),
        "format is 'something else'": bad("g", rated, format="something else"),
        "not an export": [write_lines(tmp_path / "list.json", [1])],
        "cannot read": [tmp_path / "nowhere.json"],
    }
    for message, paths in cases.items():
        with pytest.raises(DataError, match=message):
            read_ratings(paths, key)
    with pytest.raises(DataError, match=r"key\.json"):
        read_key(good)


def test_answers_of_several_files_are_put_together(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", {"prompt": "Why?", "answers": {"a": "x"}})
    second = write_lines(tmp_path / "b.jsonl", {"prompt": "Why?", "answers": {"b": "y"}})
    assert read_answers([first, second]) == {"Why?": {"a": "x", "b": "y"}}
    cases = {
        "only a has answered": [first],
        "a.jsonl:1: a has answered this prompt differently": [
            write_lines(tmp_path / "c.jsonl", {"prompt": "Why?", "answers": {"a": "z"}}),
            first,
        ],
        "d.jsonl:1 needs": [write_lines(tmp_path / "d.jsonl", {"prompt": "Why?", "answers": {"a": 3}})],
        "e.jsonl:1 holds": [write_lines(tmp_path / "e.jsonl", [1, 2])],
        "nothing to compare": [write_lines(tmp_path / "f.jsonl")],
        "cannot read": [tmp_path / "nowhere.jsonl"],
    }
    for message, paths in cases.items():
        with pytest.raises(DataError, match=message):
            read_answers(paths)
    (tmp_path / "g.jsonl").write_text("{", encoding="utf-8")
    with pytest.raises(DataError, match=r"g\.jsonl:1 is not JSON"):
        read_answers([tmp_path / "g.jsonl"])
    with pytest.raises(DataError, match=r"b\.jsonl:1 needs|prompt"):
        read_prompts(write_lines(tmp_path / "h.jsonl", {"question": "Why?"}))


def test_command_from_models_to_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models answer, a page is made of it, somebody rates, and the ratings come back under the models' names."""
    models = [str(save_folder(tmp_path / name, tiny_llama(seed=seed))) for name, seed in (("one", 1), ("two", 2))]
    prompts = write_lines(tmp_path / "prompts.jsonl", *({"prompt": f"Tell of {thing}."} for thing in ("the sea", "the inn", "a thing")))
    page = tmp_path / "out" / "page.html"
    making = ["eval", "human", "--models", *models, "--prompts", str(prompts), "--max-new-tokens", "12", "--output", str(page)]
    assert main(making) == 0
    written = read_answers([page.with_suffix(".answers.jsonl")])
    assert list(written) == [f"Tell of {thing}." for thing in ("the sea", "the inn", "a thing")]
    assert len({text for by_model in written.values() for text in by_model.values()}) > 3
    capsys.readouterr()
    assert main(making) == ConfigError.exit_code
    assert "ratings may be made" in capsys.readouterr().err

    key = read_key(page.with_suffix(".key.json"))
    rated = dict(as_rated(key, prompt, models[1], {models[0]: (1, 2), models[1]: (4, 5)}) for prompt in range(3))
    collecting = [
        "eval",
        "human",
        "--collect",
        str(export(tmp_path, key.page_id, "ann", rated)),
        "--key",
        str(page.with_suffix(".key.json")),
    ]
    assert main([*collecting, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    (won,) = result["win_rates"]
    assert (won["model"], won["rate"]["value"], won["losses"]) == (models[0], 0.0, 3)
    assert main(collecting) == 0
    shown = capsys.readouterr().out
    assert "how far they agree is not known" in shown
    assert "0.0%" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "a", "--prompts", "p"], "two different models"),
        (["--models", "a", "b"], "need --prompts"),
        (["--answers", "a", "--prompts", "p"], "leave it out"),
        (["--answers", "a", "--limit", "0"], "at least 1"),
        (["--answers", "a", "--key", "k"], "belongs to --collect"),
        (["--collect", "a"], "needs --key"),
        (["--models", "a", "b", "--prompts", "p", "--max-new-tokens", "0"], "at least 1"),
    ],
)
def test_arguments_that_do_not_fit(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "human", *words, *([] if words[0] == "--collect" else ["--output", str(tmp_path / "page.html")])]) == 2
    assert message in capsys.readouterr().err
