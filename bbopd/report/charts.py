"""Curves of a run over the tokens it trained on, and where its time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bbopd.report.drawing import FAINT, SERIES, STYLE, to_svg
from bbopd.report.load import RunData
from bbopd.report.table import MEASURES


@dataclass(frozen=True, slots=True)
class Curve:
    """One line: a point for each line of the run's files that has both numbers. ``is_sparse`` ones mark their points."""

    label: str
    points: Sequence[tuple[float, float]]
    is_sparse: bool = False


def charts(data: RunData) -> list[tuple[str, str]]:
    """Every drawing this run has data for, as (title, SVG element)."""
    drawings = [
        ("Loss over training", "nats per token", _step_curves(data, {"loss": "loss", "ce": "cross-entropy", "kd": "distillation"})),
        ("KL to the teacher", "nats per token", _stage_curves(data, "kl_rollouts", "kl_held_out")),
        ("Held-out text", "bits per byte", _stage_curves(data, "bits_per_byte")),
        ("Top-1 agreement with the teacher", "share of tokens", _stage_curves(data, "top1_rollouts", "top1_held_out")),
        ("Discriminator: accuracy", "share of pairs", _both_curves(data, "discriminator_accuracy")),
        ("Discriminator: lead of the teacher's answers", "score", _both_curves(data, "discriminator_margin")),
        ("Lengths", "tokens", _step_curves(data, {"student_length_mean": "student", "teacher_length_mean": "teacher"})),
        ("Reward", "", _step_curves(data, {"reward_mean": "mean", "reward_std": "standard deviation"})),
        ("Reward by length", "correlation", _step_curves(data, {"reward_length_correlation": "of a step"})),
        ("Win rate against the teacher's answers", "share of pairs", _stage_curves(data, "win_rate")),
        ("Learning rate", "", _step_curves(data, {"lr": "learning rate"})),
        ("Loss weights", "", _step_curves(data, {"ce_weight": "cross-entropy", "kd_weight": "distillation"})),
        ("Gradient norm, before clipping", "L2 norm", _step_curves(data, {"grad_norm": "gradient norm"})),
    ]
    cold_start = max(
        (tokens for line, tokens in zip(data.metrics, data.trained_tokens, strict=True) if line.get("phase") == "cold_start"), default=0
    )
    found = [(title, _draw_curves(title, unit, curves, cold_start)) for title, unit, curves in drawings if curves]
    seconds = {str(name): float(value) for name, value in (data.summary.get("seconds") or {}).items() if value}
    if seconds:
        found.append(("Where the time went", _draw_bars("Where the time went", seconds)))
    return found


def _step_curves(data: RunData, labels: dict[str, str]) -> list[Curve]:
    tokens = data.trained_tokens
    curves = []
    for key, label in labels.items():
        points = [(float(x), float(line[key])) for line, x in zip(data.metrics, tokens, strict=True) if _is_number(line.get(key))]
        if any(y for _, y in points):  # a term that has no part in this run stays 0
            curves.append(Curve(label, points))
    return curves


def _stage_curves(data: RunData, *keys: str) -> list[Curve]:
    titles = {measure.key: measure.title.rpartition(", ")[2] for measure in MEASURES}
    curves = []
    for key in keys:
        points = [(float(data.tokens_at(int(line.get("step", 0)))), float(line[key])) for line in data.evals if _is_number(line.get(key))]
        if points:
            curves.append(Curve(titles[key], points, is_sparse=True))
    return curves


def _both_curves(data: RunData, key: str) -> list[Curve]:
    return [*_step_curves(data, {key: "in training"}), *_stage_curves(data, key)]


def _draw_curves(title: str, unit: str, curves: Sequence[Curve], cold_start: int) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes: Axes = figure.subplots()
        for colour, curve in zip(SERIES, curves, strict=False):
            x, y = zip(*sorted(curve.points), strict=True)
            marker = "o" if curve.is_sparse or len(x) == 1 else ""
            axes.plot(x, y, color=colour, label=curve.label, marker=marker, markersize=3.5)
        if cold_start:
            axes.axvspan(0, cold_start, color=FAINT, alpha=0.18, linewidth=0, label="cold start")
        axes.set_title(title)
        axes.set_xlabel("response tokens trained")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if len(curves) > 1 or cold_start:
            axes.legend()
        return to_svg(figure, title)


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
