"""Results of tasks as tables for a terminal: figures, their cost, and how models differ on the same items."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

Line = Mapping[str, Any]


def tables(document: Line) -> list[Table]:
    """Of what `results.document` gives. There is no table of differences for one model; several are called by letters."""
    names = [model["name"] for model in document["models"]]
    labels = {name: name if len(names) == 1 else f"{chr(ord('A') + place % 26)}{place // 26 or ''}" for place, name in enumerate(names)}
    found = [_figures(document, labels), _cost(document, labels)]
    return [*found, _differences(document, labels)] if document["comparisons"] else found


def _figures(document: Line, labels: Mapping[str, str]) -> Table:
    names = list(labels)
    legend = "".join(f"\n{label}  {name}" for name, label in labels.items() if label != name)
    table = _table(f"Results{legend}", "value ± standard error; ↓: lower is better", ("Task", "metric", "items"), tuple(labels.values()))
    rows = {(row["task"], row["model"]): row for row in document["rows"]}
    for task in (task["name"] for task in document["tasks"]):
        metrics = dict.fromkeys(metric for name in names for metric in rows.get((task, name), {"metrics": {}})["metrics"])
        for metric in metrics:
            cells = [rows.get((task, name), {"metrics": {}})["metrics"].get(metric) for name in names]
            known = [cell for cell in cells if cell is not None]
            items = "/".join(dict.fromkeys(str(cell["items"]) for cell in known))
            arrow = "" if known[0]["higher_is_better"] else " ↓"
            table.add_row(task, metric + arrow, items, *(_value(cell) for cell in cells))
    return table


def _cost(document: Line, labels: Mapping[str, str]) -> Table:
    note = (
        "tokens read and written, over seconds in the model; latency: one request alone, the median of a few; memory: peak of the process"
    )
    table = _table("Cost", note, ("Task", "model"), ("parameters", "tokens", "tokens/s", "latency", "peak memory"))
    parameters = {model["name"]: model["parameters"] for model in document["models"]}
    for row in document["rows"]:
        latency, peak = row["latency_seconds"], row["peak_memory_bytes"]
        table.add_row(
            row["task"],
            labels[row["model"]],
            f"{parameters[row['model']] / 1e6:,.1f} M",
            f"{row['tokens']:,}",
            f"{row['tokens_per_second']:,.0f}",
            "" if latency is None else f"{1000 * latency:,.0f} ms",
            "" if peak is None else f"{peak / 1e9:,.2f} GB",
        )
    return table


def _differences(document: Line, labels: Mapping[str, str]) -> Table:
    note = (
        "on the items of both, with the interval and p-value of a paired bootstrap, and McNemar's exact p where an item is right or wrong; "
        "not corrected for the number of rows"
    )
    table = _table(
        "Differences", note, ("Task", "metric", "models"), ("difference", f"{document['confidence']:.0%} interval", "p", "McNemar")
    )
    for line in document["comparisons"]:
        test = line["mcnemar"]
        table.add_row(
            line["task"],
            line["metric"],
            f"{labels[line['second']]} − {labels[line['first']]}",
            f"{line['difference']:+.3g}",
            f"{line['low']:+.3g}, {line['high']:+.3g}",
            f"{line['p_value']:.3f}",
            "" if test is None else f"{test['p_value']:.3f}",
            style="bold" if line["is_clear"] else "",
        )
    return table


def _table(title: str, note: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", caption=note, caption_justify="left", box=SIMPLE_HEAD)
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _value(cell: Line | None) -> str:
    if cell is None:
        return "–"
    error = cell["standard_error"]
    return f"{cell['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")
