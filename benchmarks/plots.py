"""Time and memory against the vocabulary and against the tokens, and games of two models, as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, NullLocator

from benchmarks.records import Record

STYLE = {"svg.hashsalt": "bbopd", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}
AXES = {"V": "vocabulary V", "N": "tokens N"}


def plot_sweeps(records: list[Record], folder: Path) -> list[Path]:
    """``linear_distill-V.svg`` and ``linear_distill-N.svg`` where the records have the sweep; the same records give the same bytes."""
    written = []
    for letter, label in AXES.items():
        points = [record for record in records if record.objective == f"sweep_{letter}" and not record.skipped]
        if points:
            folder.mkdir(parents=True, exist_ok=True)
            written.append(_plot(points, letter, label, folder / f"linear_distill-{letter}.svg"))
    return written


def _plot(records: list[Record], letter: str, label: str, path: Path) -> Path:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, column, title in (
            (left, "median_ms", "time of a step, ms"),
            (right, "memory_mib", "memory beyond inputs and gradients, MiB"),
        ):
            for index, name in enumerate(dict.fromkeys(record.contestant for record in records)):
                rows = [record for record in records if record.contestant == name and getattr(record, column) is not None]
                style = "--" if name.startswith("floor") else "-"
                axes.plot(
                    [getattr(row, letter) for row in rows],
                    [max(getattr(row, column), 0.1) for row in rows],
                    style,
                    color=f"C{index}",
                    marker="o",
                    markersize=3,
                    label=name,
                )
            axes.set(xscale="log", yscale="log", xlabel=label, title=title)
            axes.set_xticks(sorted({getattr(record, letter) for record in records}))
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_locator(NullLocator())
        left.legend(fontsize=7, frameon=False)
        first = records[0]
        fixed = f"N = {first.N:,}" if letter == "V" else f"V = {first.V:,}"
        figure.suptitle(
            f"linear_distill, top-64 + tail + CE at T = 2, {first.dtype}, {fixed}, D = {first.D:,}; {first.threads} threads", fontsize=9
        )
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def plot_games(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Of each run in `benchmarks.adoption`: style, the discriminator's accuracy, and lengths, against updates."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        style, accuracy, length = figure.subplots(1, 3)
        for index, run in enumerate(runs):
            looks, updates = run["looks"], [line for line in run["updates"] if "student_length_mean" in line]
            drawn: dict[str, Any] = {"color": f"C{index}", "label": run["arm"]}
            style.plot([look["tokens"] for look in looks], [look["style_share"] for look in looks], marker="o", markersize=3, **drawn)
            accuracy.plot([line["step"] for line in updates], [line["discriminator_accuracy"] for line in updates], **drawn)
            length.plot([line["step"] for line in updates], [line["student_length_mean"] for line in updates], **drawn)
            if updates and index == 0:
                theirs = [line["teacher_length_mean"] for line in updates]
                length.plot([line["step"] for line in updates], theirs, "--", color="grey", label="teacher")
        style.set(xlabel="trained tokens", title="held-out answers in style", ylim=(-0.03, 1.03))
        accuracy.set(xlabel="update", title="discriminator's accuracy", ylim=(-0.03, 1.03))
        length.set(xlabel="update", title="tokens of an answer")
        for axes in (style, accuracy, length):
            axes.legend(fontsize=7, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


def plot_curves(rows: Sequence[Mapping[str, Any]], measures: Mapping[str, str], path: Path) -> None:
    """Of each arm its ``measures`` against trained tokens: a line of means over runs, and every run's own behind it."""
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        for axes, (name, title) in zip(figure.subplots(1, len(measures)), measures.items(), strict=True):
            for index, arm in enumerate(arms):
                by_run: dict[str, list[tuple[int, float]]] = {}
                for row in rows:
                    if row["arm"] == arm:
                        by_run.setdefault(row["run"], []).append((row["tokens"], row[name]))
                runs = list(by_run.values())
                for points in runs:
                    axes.plot(*zip(*points, strict=True), color=f"C{index}", alpha=0.25, linewidth=0.8)
                shared = zip(*runs, strict=False)
                means = [(sum(x for x, _ in at) / len(at), sum(y for _, y in at) / len(at)) for at in shared]
                axes.plot(*zip(*means, strict=True), color=f"C{index}", marker="o", markersize=3, label=arm)
            axes.set(xlabel="trained tokens", title=title)
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        figure.axes[0].legend(fontsize=7, frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})
