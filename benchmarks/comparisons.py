"""What `bbopd compare` found, as the CSV and the Markdown table of an experiment's page."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import describe

SPENT = ("student_tokens", "updates", "seconds")


def publish(module: str, compared: Path, results: Path, shown: Mapping[str, str]) -> Path:
    """``NAME.csv`` and ``NAME.md`` of this machine under ``results``, NAME the last part of ``module``; returns the page.

    compared : the output folder of the comparison
    shown : measures of the table, and what they are called there
    """
    machine = describe(module=module)
    found = json.loads((compared / "compare.json").read_text(encoding="utf-8"))
    rows = rows_of(found, {name: machine[name] for name in ("processor", "cores", "torch", "date")})
    place = results / machine["machine"]
    name = module.rpartition(".")[2]
    write_csv(place / f"{name}.csv", rows)
    page = place / f"{name}.md"
    page.write_text(table(rows, [pair["verdict"] for pair in found["pairs"]], shown), encoding="utf-8")
    return page


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def rows_of(found: Mapping[str, Any], machine: Mapping[str, str]) -> list[dict[str, Any]]:
    """A line for each arm and measure, from the compare.json of `bbopd compare`."""
    rows = []
    for row in found["rows"]:
        for measure, tested in row["tested"].items():
            spent = {name: row["spent"].get(name) for name in SPENT}
            figures = {name: tested[name] for name in ("value", "low", "high", "items")}
            rows.append({"arm": row["name"], "seeds": len(row["seeds"]), "measure": measure, **figures, **spent, **machine})
    return rows


def table(rows: Sequence[Mapping[str, Any]], verdicts: Sequence[str], shown: Mapping[str, str]) -> str:
    """What of it a reader asks first, in Markdown, with 95% intervals."""
    values = {(row["arm"], row["measure"]): row for row in rows}
    lines = ["| arm | " + " | ".join(shown.values()) + " | tokens trained | seconds |", "|" + "---|" * (len(shown) + 3)]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = [_cell(values.get((arm, measure)), measure) for measure in shown]
        spent = next(row for row in rows if row["arm"] == arm)
        cells += ["" if not spent[name] else f"{spent[name]:,.0f}" for name in ("student_tokens", "seconds")]
        lines.append(f"| `{arm}` | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *(f"* {verdict}" for verdict in verdicts)]) + "\n"


def _cell(row: Mapping[str, Any] | None, measure: str) -> str:
    if row is None:
        return ""
    if measure.endswith(("exact_match", "top1_held_out", "top1_rollouts")):
        return f"{row['value']:.0%} ({max(0.0, row['low']):.0%} to {min(1.0, row['high']):.0%})"
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
