"""Rates of the teacher service, one line a contestant, as CSV, and the table made of it.

A ratio is the median over rounds of a contestant's rate by the first one's in the same round, so that what the machine does beside it
falls on both alike.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from benchmarks import machine
from benchmarks.contest import ROOT

RESULTS = ROOT / "benchmarks" / "results"
SCRIPTS = {"wire": "The wire", "teacher": "Scoring", "teacher_memory": "Memory of a server", "align": "Alignment of two tokenisations"}
HOW = (
    "Rounds are interleaved. A ratio is the median over rounds of a contestant's rate by the first one's in the same round, with the "
    "lowest and the highest."
)
_INTEGERS, _NUMBERS = ("rounds",), ("tokens_per_second", "fastest", "ratio", "lowest_ratio", "highest_ratio")


@dataclass(slots=True)
class Runner:
    """A contestant's rounds: tokens a second in each; or why there are none. ``figures`` are what else was measured, by heading."""

    name: str
    note: str = ""
    skipped: str = ""
    rates: list[float] = field(default_factory=list)
    figures: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rate:
    """One contestant of one task, as it is written down."""

    task: str
    contestant: str
    rounds: int
    tokens_per_second: float | None
    fastest: float | None
    ratio: float | None
    lowest_ratio: float | None
    highest_ratio: float | None
    figures: str
    note: str
    skipped: str
    processor: str
    instruction_sets: str
    cores: str
    threads: str
    torch: str
    python: str
    date: str
    command: str
    machine: str


def publish(script: str, task: str, runners: Sequence[Runner], threads: str, results: Path = RESULTS) -> Path:
    """Put one task's rates into ``<machine>/<script>.csv``, in place of its earlier ones, and make the table again. Returns its path."""
    first = runners[0]
    where = machine.describe() | {"threads": threads}
    new = [_rate(task, runner, first, where) for runner in runners]
    path = results / where["machine"] / f"{script}.csv"
    old = [rate for rate in read(path) if rate.task != task] if path.exists() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [each.name for each in fields(Rate)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(rate) for rate in [*old, *new])
    return remake(path)


def read(path: Path) -> list[Rate]:
    with path.open(newline="") as file:
        return [Rate(**{name: _parsed(name, value) for name, value in row.items()}) for row in csv.DictReader(file)]


def remake(path: Path) -> Path:
    """The table from the CSV file alone."""
    table = path.with_suffix(".md")
    table.write_text(markdown(path.stem, read(path)))
    return table


def markdown(script: str, rates: Sequence[Rate]) -> str:
    one = rates[0]
    lines = [
        f"# {SCRIPTS[script]}",
        "",
        f"{one.processor}, {one.cores} cores; instruction sets: {one.instruction_sets}. PyTorch {one.torch}, Python {one.python}.",
    ]
    if any(rate.rounds for rate in rates):
        lines += ["", HOW]
    for task in dict.fromkeys(rate.task for rate in rates):
        lines += ["", f"## {task}", "", *_table([rate for rate in rates if rate.task == task])]
    return "\n".join(lines) + "\n"


def _table(rates: Sequence[Rate]) -> list[str]:
    headings = list(dict.fromkeys(heading for rate in rates for heading, _ in _figures(rate)))
    has_rates = any(rate.rounds for rate in rates)
    columns = ["", *(["tokens/s, median", "best", "ratio"] if has_rates else []), *headings, "note"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 2) + "---|"]
    for rate in rates:
        told = dict(_figures(rate))
        ratio = "–" if rate.ratio is None else f"{rate.ratio:.3g} ({rate.lowest_ratio:.3g} to {rate.highest_ratio:.3g})"
        cells = [rate.contestant]
        if has_rates:
            cells += [*("–" if value is None else f"{value:,.0f}" for value in (rate.tokens_per_second, rate.fastest)), ratio]
        cells += [told.get(heading, "–") for heading in headings]
        cells.append(f"skipped: {rate.skipped}" if rate.skipped else rate.note)
        lines.append("| " + " | ".join(cells) + " |")
    one = rates[0]
    rounds = f"{one.rounds} rounds, " if has_rates else ""
    return [*lines, "", f"{rounds}{one.threads}, {one.date}: `{one.command}`"]


def _figures(rate: Rate) -> list[tuple[str, str]]:
    parts = [part.partition("=") for part in rate.figures.split("; ") if part]
    return [(heading, value) for heading, _, value in parts]


def _rate(task: str, runner: Runner, first: Runner, where: dict[str, str]) -> Rate:
    ratios = [own / other for own, other in zip(runner.rates, first.rates, strict=False)]
    return Rate(
        task=task,
        contestant=runner.name,
        rounds=len(runner.rates),
        tokens_per_second=statistics.median(runner.rates) if runner.rates else None,
        fastest=max(runner.rates, default=None),
        ratio=statistics.median(ratios) if ratios else None,
        lowest_ratio=min(ratios, default=None),
        highest_ratio=max(ratios, default=None),
        figures="; ".join(f"{heading}={value}" for heading, value in runner.figures.items()),
        note=runner.note,
        skipped=runner.skipped,
        **where,
    )


def _parsed(name: str, value: str) -> object:
    if name in _INTEGERS:
        return int(value)
    if name in _NUMBERS:
        return float(value) if value else None
    return value
