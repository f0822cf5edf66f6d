"""Curves over the tokens that were trained on, of one run or of several laid over each other, and where the time went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bbopd.report.drawing import FAINT, INK, SERIES, STYLE, to_svg
from bbopd.report.load import RunData
from bbopd.report.table import MEASURES, split_key

MOST_CURVES = len(SERIES)
_DASHES = ("-", "--", ":", "-.")
_SCALES = {  # of the metrics of tasks, by how their names begin; any other has one of its own
    "share": ("acc", "exact_match", "f1", "rouge", "win_rate", "top1"),
    "nats per token": ("kl_", "reverse_kl_"),
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: a point for each line of the run's files that has both numbers. ``is_sparse`` ones mark their points."""

    label: str
    points: Sequence[tuple[float, float]]
    is_sparse: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """What one drawing shows: figures of optimizer steps by key, with their labels, and measures of evaluations by key."""

    title: str
    unit: str
    steps: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[str, ...] = ()
    more: Callable[[RunData], list[Curve]] = lambda data: []

    def curves(self, data: RunData) -> list[Curve]:
        return [*_step_curves(data, self.steps), *_stage_curves(data, self.stages), *self.more(data)][:MOST_CURVES]


def charts(data: RunData) -> list[tuple[str, str]]:
    """Every drawing this run has data for, as (title, SVG element)."""
    cold_start = max(
        (tokens for line, tokens in zip(data.metrics, data.trained_tokens, strict=True) if line.get("phase") == "cold_start"), default=0
    )
    found = []
    for chart in (*CHARTS, *_task_charts([data])):
        curves = chart.curves(data)
        if curves:
            styled = [(curve, colour, "-") for curve, colour in zip(curves, SERIES, strict=False)]
            found.append((chart.title, _draw_curves(chart, styled, legend="curves", cold_start=cold_start)))
    seconds = {str(name): float(value) for name, value in (data.summary.get("seconds") or {}).items() if value}
    if seconds:
        found.append(("Where the time went", _draw_bars("Where the time went", seconds)))
    return found


def overlaid_charts(runs: Sequence[RunData]) -> list[tuple[str, str]]:
    """The drawings that two runs or more have data for: a colour a run, and, where a drawing has several curves of each, a dash a curve."""
    found = []
    for chart in (*CHARTS, *_task_charts(runs)):
        by_run = [chart.curves(run) for run in runs]
        if sum(bool(curves) for curves in by_run) < 2:
            continue
        labels = list(dict.fromkeys(curve.label for curves in by_run for curve in curves))
        styled = [
            (curve, SERIES[index], _DASHES[labels.index(curve.label) % len(_DASHES)])
            for index, curves in enumerate(by_run)
            for curve in curves
        ]
        found.append((chart.title, _draw_curves(chart, styled, legend="dashes" if len(labels) > 1 else "none")))
    return found


def _step_curves(data: RunData, labels: Mapping[str, str]) -> list[Curve]:
    tokens = data.trained_tokens
    curves = []
    for key, label in labels.items():
        points = [(float(x), float(line[key])) for line, x in zip(data.metrics, tokens, strict=True) if _is_number(line.get(key))]
        if any(y for _, y in points):  # a term that has no part in this run stays 0
            curves.append(Curve(label, points))
    return curves


def _stage_curves(data: RunData, keys: Sequence[str]) -> list[Curve]:
    titles = {measure.key: measure.title.rpartition(", ")[2] for measure in MEASURES} | {
        key: split_key(key)[1] for key in keys if "." in key
    }
    curves = []
    for key in keys:
        points = [(float(data.tokens_at(int(line.get("step", 0)))), float(line[key])) for line in data.evals if _is_number(line.get(key))]
        if points:
            curves.append(Curve(titles[key], points, is_sparse=True))
    return curves


def _rejected_curves(data: RunData) -> list[Curve]:
    """By reason, those with the most rejected sequences."""
    last: Mapping[str, int] = next((line["rejected"] for line in reversed(data.metrics) if line.get("rejected")), {})
    reasons = sorted(last, key=last.__getitem__, reverse=True)[:MOST_CURVES]
    counts = [(float(tokens), line.get("rejected") or {}) for line, tokens in zip(data.metrics, data.trained_tokens, strict=True)]
    return [Curve(reason.replace("_", " "), [(x, float(known.get(reason, 0))) for x, known in counts]) for reason in reasons]


CHARTS = (
    Chart("Loss over training", "nats per token", {"loss": "loss", "ce": "cross-entropy", "kd": "distillation"}),
    Chart("KL to the teacher", "nats per token", stages=("kl_rollouts", "kl_held_out")),
    Chart("Held-out text", "bits per byte", stages=("bits_per_byte",)),
    Chart("Top-1 agreement with the teacher", "share of tokens", stages=("top1_rollouts", "top1_held_out")),
    Chart("Discriminator: accuracy", "share of pairs", {"discriminator_accuracy": "in training"}, ("discriminator_accuracy",)),
    Chart("Discriminator: lead of the teacher's answers", "score", {"discriminator_margin": "in training"}, ("discriminator_margin",)),
    Chart(
        "Lengths",
        "tokens",
        {"rollout_length_mean": "rollouts", "student_length_mean": "student, beside the teacher", "teacher_length_mean": "teacher"},
    ),
    Chart("Rollouts cut off at the limit of length", "share of rollouts", {"truncated_share": "of a step"}),
    Chart("Reward", "", {"reward_mean": "mean", "reward_std": "standard deviation"}),
    Chart("Reward by length", "correlation", {"reward_length_correlation": "of a step"}),
    Chart("Win rate against the teacher's answers", "share of pairs", stages=("win_rate",)),
    Chart("Staleness of rollouts", "cycles", {"staleness_mean": "mean", "staleness_max": "largest"}),
    Chart("Rejected so far", "sequences", more=_rejected_curves),
    Chart("Mass outside the teacher's ids", "share", {"teacher_tail_mass": "tail"}),
    Chart("Cost of the teacher", "so far", {"teacher_cost": "paid or reserved"}),
    Chart("Energy", "joules so far", {"energy_joules": "counted by the machine"}),
    Chart("Learning rate", "", {"lr": "learning rate"}),
    Chart("Loss weights", "", {"ce_weight": "cross-entropy", "kd_weight": "distillation"}),
    Chart("Gradient norm, before clipping", "L2 norm", {"grad_norm": "gradient norm"}),
)


def _task_charts(runs: Sequence[RunData]) -> list[Chart]:
    """A drawing for each task and scale of its metrics."""
    groups: dict[tuple[str, str], list[str]] = {}
    for key in dict.fromkeys(key for run in runs for line in run.evals for key in line if "." in key):
        task, metric = split_key(key)
        scale = next((scale for scale, names in _SCALES.items() if metric.startswith(names)), metric)
        groups.setdefault((task, scale), []).append(key)
    return [
        Chart(f"{task}: {split_key(keys[0])[1]}" if len(keys) == 1 else f"{task}, {scale}", scale, stages=tuple(keys))
        for (task, scale), keys in groups.items()
    ]


def _draw_curves(
    chart: Chart, curves: Sequence[tuple[Curve, str, str]], *, legend: Literal["curves", "dashes", "none"], cold_start: int = 0
) -> str:
    """``curves`` with their colours and dashes; a legend of curves, or of dashes where colours are runs and the page names these."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes: Axes = figure.subplots()
        for curve, colour, dash in curves:
            x, y = zip(*sorted(curve.points), strict=True)
            marker = "o" if curve.is_sparse or len(x) == 1 else ""
            axes.plot(x, y, color=colour, linestyle=dash, label=curve.label, marker=marker, markersize=3.5)
        if cold_start:
            axes.axvspan(0, cold_start, color=FAINT, alpha=0.18, linewidth=0, label="cold start")
        axes.set_title(chart.title)
        axes.set_xlabel("response tokens trained")
        axes.set_ylabel(chart.unit)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        handles, labels = axes.get_legend_handles_labels()
        if legend == "dashes":
            by_label = {curve.label: axes.plot([], [], color=INK, linestyle=dash)[0] for curve, _, dash in curves}
            handles, labels = list(by_label.values()), list(by_label)
        if legend == "dashes" or (legend == "curves" and len(handles) > 1):
            figure.legend(handles, labels, loc="outside lower left", ncols=3 if max(map(len, labels)) < 15 else 2)
        return to_svg(figure, chart.title)


def _draw_bars(title: str, seconds: dict[str, float]) -> str:
    total = sum(seconds.values())
    names = sorted(seconds, key=seconds.__getitem__)
    with matplotlib.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(4.6, 0.9 + 0.27 * len(names)), layout="constrained")
        axes: Axes = figure.subplots()
        bars = axes.barh([name.replace("_", " ") for name in names], [seconds[name] for name in names], color=SERIES[0], height=0.62)
        axes.bar_label(bars, [f"{seconds[name]:,.1f} s · {seconds[name] / total:.0%}" for name in names], padding=3, fontsize=8)
        axes.margins(x=0.3)
        axes.set_title(title)
        axes.set_xlabel("seconds")
        axes.xaxis.set_major_locator(MaxNLocator(4))
        return to_svg(figure, title)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
