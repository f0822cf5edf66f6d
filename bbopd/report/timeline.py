"""What each stage of a run did and waited for, drawn from its trace.json: shares of the whole, and a few cycles close up."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from bbopd.pipeline.trace import Span, read_spans
from bbopd.report.drawing import FAINT, SERIES, STYLE, to_svg
from bbopd.report.load import RunData

STAGES = ("sampling", "scoring", "training")
NOTE = (
    "Of the session that wrote trace.json last, which Perfetto opens. Stages work side by side where cycles overlap, so their shares do "
    "not add up. A stage that neither works nor waits has nothing to do by the order of things: its turn has not come"
)
_CYCLES = 3  # in the close-up
_BINS = 400  # of time in the close-up, so that the drawing stays small
_IN_WAITS = "wait: "


@dataclass(frozen=True, slots=True)
class StageShare:
    """Shares of a session's seconds: at work, and in each wait, by its reason."""

    stage: str
    busy: float
    waits: Mapping[str, float]


def stage_shares(data: RunData) -> list[StageShare]:
    """Of the stages that did anything; none where the run has no trace."""
    figures = data.trace.get("otherData") or {}
    elapsed = float(figures.get("elapsed_seconds") or 0.0)
    busy, waits = figures.get("busy_seconds") or {}, figures.get("wait_seconds") or {}
    if elapsed <= 0:
        return []
    return [
        StageShare(stage, busy[stage] / elapsed, {reason: seconds / elapsed for reason, seconds in (waits.get(stage) or {}).items()})
        for stage in STAGES
        if busy.get(stage)
    ]


def timeline_drawings(data: RunData) -> list[tuple[str, str]]:
    """The drawings there is a trace for, as (title, SVG element)."""
    found = []
    shares = stage_shares(data)
    if shares:
        found.append(("At work and waiting", _draw_shares("At work and waiting", shares)))
    spans = read_spans(data.trace)
    window = _window(spans)
    if window is not None:
        first, last, start, end = window
        title = f"Cycles {first} to {last}, stage by stage" if last > first else f"Cycle {first}, stage by stage"
        found.append((title, _draw_window(title, spans, start, end)))
    return found


def _window(spans: Sequence[Span]) -> tuple[int, int, float, float] | None:
    """First and last cycle of the close-up, and its seconds: cycles in a row that wrote rollouts, as near to the middle as there are."""
    cycles: defaultdict[int, list[Span]] = defaultdict(list)
    writing = [span.start for span in spans if span.lane == "sampling" and not span.is_alone]
    for span in spans:
        if span.lane == "training" and "cycle" in span.about and writing and span.end > min(writing):
            cycles[int(span.about["cycle"])].append(span)
    for length in range(min(_CYCLES, len(cycles)), 0, -1):
        starts = [cycle for cycle in cycles if all(cycle + offset in cycles for offset in range(length))]
        if starts:
            first = sorted(starts)[len(starts) // 2]
            before = [span.end for cycle, trained in cycles.items() if cycle < first for span in trained]
            inside = [span for offset in range(length) for span in cycles[first + offset]]
            start = max((end for end in before if end <= min(span.start for span in inside)), default=min(writing))
            return first, first + length - 1, start, max(span.end for span in inside)
    return None


def _draw_shares(title: str, shares: Sequence[StageShare]) -> str:
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.4, 0.9 + 0.4 * len(shares)), layout="constrained")
        axes: Axes = figure.subplots()
        for row, share in enumerate(reversed(shares)):
            axes.barh(row, share.busy, color=SERIES[0], height=0.5, label="at work" if not row else None)
            axes.barh(row, sum(share.waits.values()), left=share.busy, color=SERIES[1], height=0.5, label="waiting" if not row else None)
            reasons = sorted(share.waits.items(), key=lambda item: -item[1])
            text = ", ".join(f"{reason} {part:.0%}" for reason, part in reasons if part >= 0.005)
            axes.text(0.01, row + 0.29, f"{share.busy:.0%} at work" + (f"; waits: {text}" if text else ""), fontsize=7.5, va="bottom")
        axes.set_yticks(range(len(shares)), [share.stage for share in reversed(shares)])
        axes.set_ylim(-0.4, len(shares) - 0.3)
        axes.set_xlim(0, max(1.0, *(share.busy + sum(share.waits.values()) for share in shares)))
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_title(title)
        axes.set_xlabel("of the session's seconds")
        return to_svg(figure, title)


def _draw_window(title: str, spans: Sequence[Span], start: float, end: float) -> str:
    inside = [span for span in spans if span.end > start and span.start < end]
    edges = np.linspace(start, end, _BINS + 1)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(9.4, 2.9), layout="constrained")
        axes: Axes = figure.subplots()
        labels = []
        for row, stage in enumerate(reversed(STAGES)):
            of_stage = [span for span in inside if span.lane == stage]
            most = _draw_lane(axes, row, of_stage, edges)
            waits = [(span.start, span.end - span.start) for span in of_stage if span.name.startswith(_IN_WAITS)]
            axes.broken_barh(waits, (row - 0.14, 0.1), color=SERIES[1], linewidth=0)
            labels.append(f"{stage}\n(up to {most})" if most else stage)
        axes.set_yticks([row + 0.35 for row in range(len(STAGES))], labels)
        axes.set_ylim(-0.3, len(STAGES))
        axes.set_xlim(start, end)
        axes.xaxis.set_major_locator(MaxNLocator(8))
        axes.set_title(title)
        axes.set_xlabel("seconds of the session; training: a box a step, a colour a cycle; below each lane, its waits")
        return to_svg(figure, title)


def _draw_lane(axes: Axes, row: int, spans: Sequence[Span], edges: np.ndarray) -> int:
    """Sequences in the stage at a time, or, in the training lane, the steps; the largest number of the former."""
    items = [span for span in spans if not span.is_alone]
    if items:
        count = _mean_count(items, edges)
        axes.stairs(row + 0.7 * count / max(1.0, count.max()), edges, baseline=row, fill=True, color=SERIES[0], linewidth=0)
    steps = [span for span in spans if span.is_alone and "cycle" in span.about]
    for parity in (0, 1):
        boxes = [(span.start, span.end - span.start) for span in steps if span.about["cycle"] % 2 == parity]
        axes.broken_barh(boxes, (row, 0.7), color=SERIES[2 if parity else 0], edgecolor=FAINT, linewidth=0.3)
    return round(float(_mean_count(items, edges).max())) if items else 0


def _mean_count(spans: Sequence[Span], edges: np.ndarray) -> np.ndarray:
    """How many of ``spans`` are under way, on average, between each two ``edges``."""
    seconds = np.zeros(len(edges) - 1)
    width = edges[1] - edges[0]
    for span in spans:
        seconds += np.clip(np.minimum(edges[1:], span.end) - np.maximum(edges[:-1], span.start), 0.0, width)
    return seconds / width
