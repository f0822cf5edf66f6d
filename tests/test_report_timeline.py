"""The drawings of a run's trace: their figures are those of the trace, whatever part of it is there."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from bbopd.pipeline.timing import Timeline
from bbopd.report.html import write_report
from bbopd.report.load import load_run
from bbopd.report.timeline import read_spans, stage_shares, timeline_drawings
from tests.simulated import Simulation, simulate
from tests.test_overlap import BALANCED, config
from tests.test_report import Page, finished_run


@pytest.fixture(scope="module")
def simulation() -> Simulation:
    return simulate(config(48), BALANCED)


def with_trace(folder: Path, trace: Any) -> Path:
    run = finished_run(folder)
    (run / "trace.json").write_text(json.dumps(trace))
    return run


def test_shares_and_close_up_are_those_of_the_trace(simulation: Simulation, tmp_path: Path) -> None:
    run = with_trace(tmp_path, simulation.lines.last_trace)
    shares = {share.stage: share for share in stage_shares(load_run(run))}
    assert shares["training"].busy * simulation.seconds == pytest.approx(
        sum(map(simulation.trainer.seconds_of, simulation.trainer.tokens)), rel=1e-3
    )
    for share in shares.values():
        assert share.busy + sum(share.waits.values()) < 1.001
    (_, first), (title, close_up) = timeline_drawings(load_run(run))
    assert f"{shares['training'].busy:.0%} at work; waits: no batch" in first
    assert f"{shares['scoring'].waits['nothing to score']:.0%}" in first
    assert re.fullmatch(r"Cycles \d to \d, stage by stage", title)
    assert "(up to 64)" in close_up, "64 rollouts are written side by side"
    assert len(first) + len(close_up) < 150_000
    assert not re.search(r"#[0-9a-f]{6}\b", first + close_up), "a colour that the dark page cannot change"
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert set(page.references) <= set(page.ids)
    assert "What each stage did" in page.text
    assert title in page.text


def test_spans_come_back_as_they_were_written(simulation: Simulation) -> None:
    trace = simulation.lines.last_trace
    spans = read_spans(json.loads(json.dumps(trace)))
    sequences = [span for span in spans if span.lane == "scoring" and not span.is_alone]
    assert len(sequences) == simulation.teacher.scored
    assert sum(span.about["tokens"] for span in sequences) == simulation.state.scored_tokens
    busy = sum(span.end - span.start for span in spans if span.name == "training")
    assert busy == pytest.approx(trace["otherData"]["busy_seconds"]["training"], rel=1e-4)


def test_what_is_not_there_is_not_drawn(tmp_path: Path) -> None:
    assert timeline_drawings(load_run(finished_run(tmp_path))) == []
    now = [0.0]
    timeline = Timeline(lambda: now[0])
    with timeline.activity("loading"):
        now[0] += 1
    run = with_trace(tmp_path, timeline.to_json())
    assert timeline_drawings(load_run(run)) == []
    with timeline.activity("training", cycle=1, step=1):  # of a cold start: nothing has been written
        now[0] += 3
    (run / "trace.json").write_text(json.dumps(timeline.to_json()))
    assert [title for title, _ in timeline_drawings(load_run(run))] == ["At work and waiting"]
    assert stage_shares(load_run(run))[0].busy == pytest.approx(0.75)
