"""The page and the table of a run: every figure of the files is there, whatever is missing, and nothing is fetched or executed."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bbopd.errors import CheckpointError, DataError
from bbopd.report.charts import charts
from bbopd.report.html import write_report
from bbopd.report.load import load_run
from bbopd.report.table import change, plain_lines, result_rows, result_table, speed_rows, speed_table, stage_titles

STEPS, COLD_STEPS, STEP_TOKENS = 30, 10, 2000


def step_line(step: int) -> dict[str, Any]:
    phase = "cold_start" if step <= COLD_STEPS else "on_policy"
    figures = {"loss": 2.0 / step, "ce": 3.0, "kd": 1.5, "lr": 1e-4, "grad_norm": 1.1, "ce_weight": 0.5, "kd_weight": 0.5}
    return {"step": step, "phase": phase, "tokens": STEP_TOKENS, "on_policy_tokens": 0, "seconds": 2.0, "elapsed": 2.0 * step, **figures}


def eval_line(stage: str, step: int, kl: float) -> dict[str, Any]:
    return {
        "stage": stage,
        "step": step,
        "bits_per_byte": 1.0 + kl / 4,
        "kl_rollouts": 1.25 * kl,
        "kl_held_out": kl,
        "reverse_kl_rollouts": 2 * kl,
        "reverse_kl_held_out": 1.5 * kl,
        "top1_rollouts": 0.4 / kl,
        "top1_held_out": 0.5 / kl,
        "standard_errors": {"kl_held_out": 0.0625},
    }


EVALS = [eval_line("start", 0, 2.512), eval_line("cold_start", 10, 1.4), eval_line("step", 20, 1.1), eval_line("end", 30, 0.852)]
HOSTILE = "<script>alert('x')</script> & <img src=x onerror=go()>"
SUMMARY = {
    "status": "finished",
    "model_path": "runs/demo/model",
    "seconds": {"setup": 20.25, "sampling": 120.0, "scoring": 60.0, "training": 200.0},
    "busy_seconds": {"sampling": 120.0, "scoring": 60.0, "training": 200.0},
    "tokens": {"sampled": 31_416, "scored": 62_832, "trained": 60_000},
    "tokens_per_second": {"sampling": 261.8, "scoring": 1047.2, "training": 300.0},
    "sequences": {"drawn": 7_215, "trained": 7_190, "rejected": 15, "pending": 10},
    "rejected": {"too_short": 3, "repetition": 12},
    "samples": [{"prompt": f"What is a {HOSTILE}?", "before": "the the the", "after": HOSTILE, "teacher": "A list\nholds items."}],
    "machine": {"processor": "Some CPU", "cores": 2, "versions": {"torch": "9.9.9"}},
    "config": {"student": {"model": "org/<model>"}},
    "command": "bbopd distill run.yaml",
    "started": "2026-01-02T03:04:05",
    "source": {"commit": "abc123", "changed_files": 4},
    "error": "the teacher <went> away",
}


def write_run(folder: Path, *, metrics: list[Any] | None = None, evals: list[Any] | None = None, summary: Any = None) -> Path:
    folder.mkdir(exist_ok=True)
    for name, lines in (("metrics.jsonl", metrics), ("evals.jsonl", evals)):
        if lines is not None:
            (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def finished_run(folder: Path) -> Path:
    return write_run(folder / "run-7", metrics=[step_line(step) for step in range(1, STEPS + 1)], evals=EVALS, summary=SUMMARY)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return finished_run(tmp_path)


class Page(HTMLParser):
    """What a browser would see: tags balanced, attributes, visible text."""

    VOID = ("meta", "link", "img", "br", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            self.references += re.findall(r"url\(#([^)]*)\)", value or "")
            if name in ("href", "xlink:href", "src"):
                assert value is not None
                assert value.startswith("#"), f"{tag} fetches {value}"
                self.references.append(value[1:])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] != "style":
            self.text += data


def read_page(run_dir: Path) -> Page:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """A finished run that no test changes, and its page."""
    folder = finished_run(tmp_path_factory.mktemp("runs"))
    return folder, read_page(folder)


def test_every_figure_is_on_the_page(finished: tuple[Path, Page]) -> None:
    text = finished[1].text
    expected = ["2.512 ± 0.062", "0.852 ± 0.062", "1.628", "1.213", "3.140", "1.065", "15.9%", "46.9%", "58.7%"]
    expected += ["-66.1%", f"{100 * (1.213 / 1.628 - 1):+.1f}%", "+31.0 points", "start", "cold start", "end"]
    expected += ["31,416", "62,832", "262", "1,047", "20.2", "120.0", "50%", "30%", "15%"]
    expected += ["too short", "3", "repetition", "12", "Some CPU", "9.9.9", "org/<model>", "bbopd distill run.yaml", "2026-01-02T03:04:05"]
    expected += ["7,215 drawn, 7,190 trained, 15 rejected, 10 pending"]
    expected += ["the the the", HOSTILE, "A list\nholds items.", "runs/demo/model", "finished", "run-7", "abc123"]
    expected += ["the teacher <went> away"]
    missing = [figure for figure in expected if figure not in text]
    assert not missing


def test_the_share_of_pushes_counts_each_push_once(run_dir: Path) -> None:
    assert "push of weights" not in write_report(run_dir).read_text()
    shares = ((0, None), (1, 0.02), (1, 0.02), (2, 0.06))
    lines = [step_line(step) | {"cycle": cycle} | ({"push_share": share} if share else {}) for step, (cycle, share) in enumerate(shares, 1)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "one push of weights to the next, 4.0% went into the push (at most 6.0%)" in write_report(run_dir).read_text()


def test_page_is_self_contained_and_inert(finished: tuple[Path, Page]) -> None:
    run_dir, page = finished  # reading it asserts that nothing is fetched
    source = (run_dir / "report.html").read_text(encoding="utf-8")
    assert "http" not in source
    assert "@import" not in source
    assert not {"script", "img", "link", "iframe", "object"} & set(page.tags)
    assert page.open == []
    assert "prefers-color-scheme:dark" in source
    assert 'name="viewport"' in source
    assert not list(run_dir.glob("*.tmp"))


def test_drawings_are_small_and_their_ids_are_their_own(finished: tuple[Path, Page]) -> None:
    run_dir, page = finished
    drawings = charts(load_run(run_dir))
    assert [title for title, _ in drawings] == [
        "Loss over training",
        "KL to the teacher",
        "Held-out text",
        "Top-1 agreement with the teacher",
        "Learning rate",
        "Loss weights",
        "Gradient norm, before clipping",
        "Where the time went",
    ]
    assert page.tags.count("svg") == len(drawings)
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert (run_dir / "report.html").stat().st_size < 250_000
    for title, svg in drawings:
        assert "<text" in svg
        assert title in svg
        assert not re.search(r"#[0-9a-f]{6}\b", svg), "a colour that the dark page cannot change"


def test_curves_show_the_points_of_the_files(finished: tuple[Path, Page]) -> None:
    """The path of a curve, read back out of the drawing, is the data up to an affine map."""
    svg = dict(charts(load_run(finished[0])))["Loss over training"]
    path = max(re.findall(r'<path d="([^"]*)"[^>]*var\(--series-1\)', svg), key=len)
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([-\d.]+) ([-\d.]+)", path)]
    loss = [2.0 / step for step in range(1, STEPS + 1)]
    assert len(points) == STEPS
    scale = (points[-1][1] - points[0][1]) / (loss[-1] - loss[0])
    for (x, y), value, step in zip(points, loss, range(STEPS), strict=True):
        assert y - points[0][1] == pytest.approx(scale * (value - loss[0]), abs=1e-3)
        assert x - points[0][0] == pytest.approx((points[-1][0] - points[0][0]) * step / (STEPS - 1), abs=1e-3)


def test_stages_stand_at_the_tokens_trained_by_then(run_dir: Path) -> None:
    data = load_run(run_dir)
    assert [data.tokens_at(step) for step in (0, 10, 30)] == [0, 10 * STEP_TOKENS, 30 * STEP_TOKENS]
    assert stage_titles(data) == ["start", "cold start", "end"]


def test_interrupted_run_shows_its_last_evaluation(run_dir: Path) -> None:
    (run_dir / "summary.json").unlink()
    (run_dir / "run.json").write_text(json.dumps({"command": "bbopd demo", "config": {"output": "here"}}), encoding="utf-8")
    write_run(run_dir, evals=EVALS[:3])
    data = load_run(run_dir)
    assert stage_titles(data) == ["start", "cold start", "step 20"]
    row = result_rows(data)[2]
    assert (row.values, row.change) == (("2.512", "1.400", "1.100"), "-56.2%")
    text = read_page(run_dir).text
    assert "interrupted" in text
    assert "bbopd demo" in text
    assert '"output": "here"' in text


@pytest.mark.parametrize(
    "files",
    [
        {"summary": SUMMARY},
        {"metrics": [step_line(1)]},
        {"evals": [eval_line("start", 0, 1.0)]},
        {"metrics": [], "evals": [], "summary": {"status": "failed"}},
        {
            "metrics": [step_line(1) | {"loss": float("nan"), "grad_norm": None}],
            "evals": [{"stage": "start", "step": 0, "kl_held_out": None}],
        },
    ],
)
def test_pieces_may_be_missing(tmp_path: Path, files: dict[str, Any]) -> None:
    folder = write_run(tmp_path / "run", **files)
    assert read_page(folder).open == []
    assert plain_lines(folder)
    assert result_table(folder).columns


def test_line_cut_short_by_a_kill_is_left_out(run_dir: Path) -> None:
    with (run_dir / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 31, "lo')
    assert len(load_run(run_dir).metrics) == STEPS


def test_folder_that_holds_no_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no run"):
        write_report(tmp_path)
    (tmp_path / "summary.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"summary\.json"):
        write_report(tmp_path)


def test_terminal_table_and_plain_lines_have_the_same_figures(run_dir: Path) -> None:
    data = load_run(run_dir)
    console = Console(width=80, force_terminal=False, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        console.print(result_table(data))
        console.print(speed_table(data))
    shown = console.export_text()
    lines = "\n".join(plain_lines(data))
    for row in result_rows(data):
        assert row.title in shown, "cut off at 80 columns"
        for figure in (*row.values, row.change):
            assert figure in shown
            assert figure in lines
    note = "scoring's are those in which only the teacher was waited for. Busy: those in which it was under way"
    assert note in " ".join(shown.split())
    assert note in lines
    for speed in speed_rows(data):
        for figure in (speed.seconds, speed.busy, speed.speed, speed.share):
            assert figure in shown
            assert figure in lines


def test_measures_without_a_figure_are_left_out_and_bucketed_ones_marked(tmp_path: Path) -> None:
    lines = [{"stage": stage, "step": 0, "bits_per_byte": bits, "kl_held_out": None} for stage, bits in (("start", 2.0), ("end", 1.5))]
    rows = result_rows(load_run(write_run(tmp_path / "sft", evals=lines)))
    assert [(row.title, row.values, row.change) for row in rows] == [("Bits per byte, held-out text", ("2.000", "1.500"), "-25.0%")]
    bucketed = [{**line, "kl_held_out": 0.25, "kl_is_bucketed": True} for line in lines]
    rows = result_rows(load_run(write_run(tmp_path / "topk", evals=bucketed)))
    assert [row.title for row in rows] == ["Bits per byte, held-out text", "Forward KL, held-out text (bucketed)"]


def test_change() -> None:
    assert change([2.0, None, 0.5], is_share=False) == "-75.0%"
    assert change([0.25, 0.5], is_share=True) == "+25.0 points"
    assert change([None, 0.5], is_share=True) == ""
    assert change([0.0, 0.5], is_share=False) == ""
