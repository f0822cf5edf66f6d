"""Models on tasks as one page: from results of ``bbopd eval`` and of a comparison, over what they cost."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from bbopd.cli.main import main
from bbopd.errors import DataError
from bbopd.report.models import render_models
from bbopd.report.standings import read_standings
from bbopd.report.tradeoffs import letters, tradeoff_drawings
from tests.test_report import Page

HOSTILE = "<i onclick=go()> & 'small'"
QUIZ = 'a $quiz$ of "two" & more'
MODELS = {"/home/someone/big": 3_600_000_000, "/home/someone/small": 135_000_000, HOSTILE: 90_000}


def results(path: Path, *, latency: float | None = 0.5) -> Path:
    """As ``bbopd eval --output`` writes them: two tasks, three models, each twice as good and half as fast as the next."""
    rows = []
    for place, name in enumerate(MODELS):
        accuracy = {"value": 0.8 / 2**place, "standard_error": 0.02, "higher_is_better": True, "items": 50}
        text = {"value": 1.0 + place, "standard_error": None, "higher_is_better": False, "items": 3}
        for task, metrics in ((QUIZ, {"acc": accuracy, "acc_norm": accuracy}), ("prose", {"bits_per_byte": text})):
            cost = {"tokens": 90, "seconds": 1.0, "tokens_per_second": 100.0 * 2**place, "peak_memory_bytes": 3e9}
            waited = None if latency is None else latency / 2**place
            rows.append({"model": name, "task": task, "metrics": metrics, "latency_seconds": waited, "truncated_requests": 0, **cost})
    line = {"task": QUIZ, "metric": "acc", "first": "/home/someone/big", "second": "/home/someone/small", "is_clear": True}
    found: dict[str, Any] = {
        "command": "/home/someone/bin/bbopd eval big small",
        "date": "2026-01-02",
        "machine": {"processor": "Some CPU", "cores": 2, "versions": {"torch": "9.9.9"}},
        "source": {"commit": "abc123", "changed_files": 0},
        "confidence": 0.95,
        "tasks": [{"name": name, "sha256": name * 3} for name in (QUIZ, "prose")],
        "models": [{"name": name, "parameters": count, "weights_sha256": "f00"} for name, count in MODELS.items()],
        "rows": rows,
        "comparisons": [line | {"difference": -0.4, "low": -0.5, "high": -0.3, "p_value": 0.001}],
    }
    path.write_text(json.dumps(found))
    return path


def comparison(folder: Path, *, with_cost: bool = True) -> Path:
    """As ``bbopd compare`` writes it, with a reference."""
    folder.mkdir(parents=True)

    def tested(value: float) -> dict[str, float]:
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "p": 0.5, "seeds": 3, "items": 40}

    cost = {"parameters": 5e6, "tokens_per_second": 900.0, "latency_seconds": 0.02}
    spent = {"student_tokens": 12_345.0, "updates": 10, "seconds": 61.0}
    rows = [
        {
            "name": name,
            "is_reference": name == "teacher",
            "seeds": [] if name == "teacher" else [0, 1, 2],
            "tested": {"bits_per_byte": tested(1.5), "exact_match": tested(value), "other.kl_held_out": tested(0.25)},
            "figures": {} if name == "teacher" else {"kl_rollouts": 0.125},
            "spent": {} if name == "teacher" else spent,
            "tried": {},
            **({"cost": {**cost, "latency_seconds": value / 10}} if with_cost else {}),
        }
        for name, value in (("sft", 0.25), ("on_policy", 0.5), ("teacher", 0.75))
    ]
    pairs = [{"first": "sft", "second": "on_policy", "verdict": "on_policy is better than sft: +25.0 points"}]
    found = {"decide_by": "exact_match", "confidence": 0.95, "rows": rows, "pairs": pairs, "failures": ["run x ended"]}
    (folder / "compare.json").write_text(json.dumps(found))
    return folder


def cells(page: str) -> list[list[str]]:
    return [row.split("</td><td>") for row in re.findall(r"<tr><td>(.*?)</td></tr>", page)]


def test_every_figure_of_an_evaluation(tmp_path: Path) -> None:
    source = render_models([read_standings(results(tmp_path / "results.json"))])
    page = Page(source)
    assert page.open == []
    assert set(page.references) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert "http" not in source
    assert "3 models on 2 tasks" in page.text
    half = "0.4 (0.361 to 0.439)"
    assert ["B  small", half, half, "135.0 M", "200", "250 ms", "3.00 GB", "50"] in cells(source)
    assert ["B  small", "2", "135.0 M", "200", "250 ms", "3.00 GB", "3"] in cells(source)
    for said in (
        HOSTILE,
        f"{QUIZ}, acc: small less big is -0.4 (95% interval -0.5 to -0.3, p = 0.001): clear",
        "abc123",
        "↓",
        "9.9.9",
        "proseproseprose",
    ):
        assert said in page.text, said
    assert "someone" not in page.text


def test_points_stand_where_their_figures_are(tmp_path: Path) -> None:
    """Right and up on the drawing as in the numbers; sizes that are far apart on a logarithmic axis."""
    standings = [one for one in read_standings(results(tmp_path / "results.json")).standings if one.task == QUIZ]
    drawings = dict(tradeoff_drawings(standings, "acc", letters([one.model for one in standings])))
    assert list(drawings) == [f"{QUIZ}: acc over {label}" for label in ("milliseconds for one request", "tokens a second", "parameters")]

    def points(svg: str) -> list[tuple[float, float]]:
        found = re.findall(r'<use [^>]*x="([\d.]+)" y="([\d.]+)"[^>]*fill: var\(--series-(\d)\)', svg)
        return [(float(x), float(y)) for _, x, y in sorted((colour, x, y) for x, y, colour in found)]

    big, small, least = points(drawings[f"{QUIZ}: acc over tokens a second"])
    assert big[0] < small[0] < least[0]
    assert big[1] < small[1] < least[1], "an SVG counts from above: the best is highest"
    assert (least[0] - small[0]) == pytest.approx(2 * (small[0] - big[0]), rel=0.01), "100, 200, 400 tokens a second"
    assert (least[1] - small[1]) == pytest.approx((small[1] - big[1]) / 2, rel=0.01), "0.8, 0.4, 0.2"
    assert points(drawings[f"{QUIZ}: acc over milliseconds for one request"])[0][0] > big[0]
    big, small, least = points(drawings[f"{QUIZ}: acc over parameters"])
    assert (small[0] - least[0]) / (big[0] - small[0]) == pytest.approx(math.log(135 / 0.09) / math.log(3600 / 135), rel=0.01)


def test_a_comparison_and_what_cannot_be_drawn(tmp_path: Path) -> None:
    source = render_models([read_standings(comparison(tmp_path / "addition"))])
    page = Page(source)
    assert cells(source)[0][:4] == ["A  sft", "0.25 (0.15 to 0.35)", "1.5 (1.4 to 1.6)", "0.25 (0.15 to 0.35)"]
    assert cells(source)[0][4:] == ["5.0 M", "900", "25 ms", "3", "0.125", "12,345", "61"]
    assert cells(source)[2][0] == "C  teacher (reference)"
    assert ">exact_match</th><th>bits_per_byte ↓</th><th>other.kl_held_out ↓</th>" in source, "what decides comes first"
    for said in ("on_policy is better than sft: +25.0 points", "run x ended", "exact_match over milliseconds for one request"):
        assert said in page.text + source
    plain = render_models([read_standings(comparison(tmp_path / "earlier", with_cost=False))])
    assert "<svg" not in plain, "measured before costs were"
    assert "tokens/s</th>" not in plain


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second, folder = results(tmp_path / "a.json"), results(tmp_path / "b.json", latency=None), comparison(tmp_path / "arms")
    assert main(["report", str(first)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "a.html")
    assert main(["report", str(folder)]) == 0
    assert "Task arms" in (folder / "report.html").read_text()
    assert main(["report", str(first), str(second), str(folder), "--output", str(tmp_path / "all.html")]) == 0
    page = (tmp_path / "all.html").read_text()
    assert "9 models on 3 tasks" in page, "two files have the same models, and each its own figures of them"
    assert "small (a)" in page
    (tmp_path / "run").mkdir()
    assert main(["report", str(first), str(tmp_path / "run")]) == DataError.exit_code
    assert "give runs, or results" in capsys.readouterr().err
    for content, said in (("{}", "holds no results"), ("{", "cannot read")):
        (tmp_path / "c.json").write_text(content)
        assert main(["report", str(tmp_path / "c.json")]) == DataError.exit_code
        assert said in capsys.readouterr().err
    empty = json.loads(first.read_text()) | {"rows": [], "comparisons": []}
    (tmp_path / "c.json").write_text(json.dumps(empty))
    assert main(["report", str(tmp_path / "c.json")]) == DataError.exit_code
    assert "no result yet" in capsys.readouterr().err
