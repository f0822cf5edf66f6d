"""Quality against what it costs: a metric of a task over latency, speed and size, a point a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from bbopd.report.drawing import INK, SERIES, STYLE, to_svg
from bbopd.report.page import figures, folded, quiet, table
from bbopd.report.standings import Score, Standing

NOTE = (
    "Bars and brackets are 95% intervals. Latency is of one request alone, tokens/s are those read and written over seconds in the model, "
    "memory is the process's peak; all are of the machine that measured them, so models measured on different ones differ by that too"
)
_WIDE = 20.0  # largest over smallest, from which on an axis is logarithmic


@dataclass(frozen=True, slots=True)
class Cost:
    """A figure of `Standing` that quality is drawn over; ``factor`` brings it into the unit of ``label``."""

    key: str
    label: str
    factor: float

    def of(self, standing: Standing) -> float | None:
        value = getattr(standing, self.key)
        return None if value is None else self.factor * float(value)


COSTS = (
    Cost("latency_seconds", "milliseconds for one request", 1e3),
    Cost("tokens_per_second", "tokens a second", 1.0),
    Cost("parameters", "parameters", 1.0),
)


def letters(models: Sequence[str]) -> dict[str, str]:
    """What drawings call each model: A, B … Z, A1 …"""
    return {model: f"{chr(ord('A') + place % 26)}{place // 26 or ''}" for place, model in enumerate(models)}


def task_section(standings: Sequence[Standing], names: Mapping[str, str]) -> str:
    """One task as HTML: a row a model, the leading metric over its costs, the other metrics folded. ``names`` are `letters`."""
    metrics = list(dict.fromkeys(metric for standing in standings for metric in standing.scores))
    drawn = [(metric, tradeoff_drawings(standings, metric, names)) for metric in metrics]
    body = _table(standings, metrics, names)
    lead, others = drawn[0], drawn[1:]
    body += figures(lead[1], kind="charts")
    return body + "".join(folded(f"{metric} over the same", figures(found, kind="charts")) for metric, found in others if found)


def tradeoff_drawings(standings: Sequence[Standing], metric: str, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """A drawing for each cost that two models differ in, as (title, SVG element)."""
    found = []
    for cost in COSTS:
        points = [(x, standing) for standing in standings if (x := cost.of(standing)) is not None and metric in standing.scores]
        if len({x for x, _ in points}) > 1:
            title = f"{standings[0].task}: {metric} over {cost.label}"
            found.append((title, _draw(title, points, metric, cost, names)))
    return found


def _draw(title: str, points: Sequence[tuple[float, Standing]], metric: str, cost: Cost, names: Mapping[str, str]) -> str:
    places = list(names)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes: Axes = figure.subplots()
        for x, standing in points:
            score = standing.scores[metric]
            colour = SERIES[places.index(standing.model) % len(SERIES)]
            if score.low is not None and score.high is not None:
                axes.plot([x, x], [score.low, score.high], color=colour, linewidth=1.2)
            axes.plot(x, score.value, color=colour, marker="o", markersize=6)
            axes.annotate(names[standing.model], (x, score.value), xytext=(6, 3), textcoords="offset points", color=INK, fontsize=8)
        if max(x for x, _ in points) > _WIDE * min(x for x, _ in points):
            axes.set_xscale("log")
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.margins(x=0.12, y=0.12)
        axes.set_title(f"{metric} over {cost.label}")
        axes.set_xlabel(cost.label)
        axes.set_ylabel(f"{metric} (lower is better)" if points[0][1].scores[metric].is_lower_better else metric)
        return to_svg(figure, title)


def _table(standings: Sequence[Standing], metrics: Sequence[str], names: Mapping[str, str]) -> str:
    more = list(dict.fromkeys(name for standing in standings for name in standing.more))
    is_lower = {metric: any(s.scores[metric].is_lower_better for s in standings if metric in s.scores) for metric in metrics}
    heads = ["Model", *(f"{metric} ↓" if is_lower[metric] else metric for metric in metrics)]
    heads += ["parameters", "tokens/s", "latency", "memory", *more]
    rows = [
        (
            f"{names[standing.model]}  {standing.model}",
            *(_text(standing.scores.get(metric)) for metric in metrics),
            "" if standing.parameters is None else _millions(standing.parameters),
            "" if standing.tokens_per_second is None else f"{standing.tokens_per_second:,.0f}",
            "" if standing.latency_seconds is None else f"{1e3 * standing.latency_seconds:,.3g} ms",
            "" if standing.peak_memory_bytes is None else f"{standing.peak_memory_bytes / 1e9:,.2f} GB",
            *(standing.more.get(name, "") for name in more),
        )
        for standing in standings
    ]
    filled = [place for place in range(len(heads)) if any(row[place] for row in rows)]
    note = quiet("↓: lower is better.") if any(is_lower.values()) else ""
    return table([heads[place] for place in filled], [[row[place] for place in filled] for row in rows]) + note


def _millions(parameters: float) -> str:
    return f"{parameters / 1e6:,.1f} M" if parameters >= 1e5 else f"{parameters:,.0f}"


def _text(score: Score | None) -> str:
    if score is None:
        return ""
    if score.low is None or score.high is None:
        return f"{score.value:.4g}"
    return f"{score.value:.4g} ({score.low:.3g} to {score.high:.3g})"
