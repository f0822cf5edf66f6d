"""What the results come to: a row for every arm and reference, and for every two of them whether they differ."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bbopd.compare.results import Result, Spent, matrices
from bbopd.config_compare import is_share
from bbopd.errors import ConfigError
from bbopd.evaluate.crossed import Interval, Matrix, holm, interval, ratios

_COSTS = ("parameters", "tokens_per_second", "latency_seconds", "peak_memory_bytes")


@dataclass(frozen=True, slots=True)
class Row:
    """An arm or a reference. ``tested`` has an interval for each measure; ``figures`` and ``spent`` are means over seeds."""

    name: str
    is_reference: bool
    learning_rate: float | None
    seeds: tuple[int, ...]
    tested: Mapping[str, Interval]
    figures: Mapping[str, float]
    spent: Mapping[str, float]
    tried: Mapping[str, float] = field(default_factory=dict)
    """By learning rate, the deciding measure on the development questions."""
    cost: Mapping[str, float] = field(default_factory=dict)
    """Of the model under test, as far as it was measured: parameters, tokens a second, latency, peak memory."""


@dataclass(frozen=True, slots=True)
class Pair:
    """``first`` minus ``second`` by the deciding measure; ``p`` is adjusted for all pairs of the table (Holm)."""

    first: str
    second: str
    difference: Interval
    p: float
    better: str | None
    """Which of the two is; None where the figures show no difference."""


def make_row(
    name: str, results: Sequence[Result], *, is_reference: bool, confidence: float, tried: Mapping[float, float] | None = None
) -> Row:
    """``results`` are those of one entrant, a seed each, all tested."""
    first = results[0]
    tested = {
        measure: interval(ratios(*matrices(list(results), measure)[1:]), confidence)
        for measure in sorted(first.measured["test"]["measures"])
    }
    figures = {key: _mean([result.figures[key] for result in results]) for key in first.figures if all(key in r.figures for r in results)}
    spent = [result.spent for result in results if result.spent is not None]
    return Row(
        name,
        is_reference,
        first.learning_rate,
        tuple(result.seed for result in results if result.seed is not None),
        tested,
        figures,
        {item.name: _mean([float(getattr(one, item.name)) for one in spent]) for item in fields(Spent)} if spent else {},
        {f"{rate:g}": value for rate, value in (tried or {}).items()},
        {
            name: _mean(known)
            for name in _COSTS
            if (known := [value for r in results if (value := r.measured["test"].get(name)) is not None])
        },
    )


def make_pairs(
    entrants: Mapping[str, Sequence[Result]],
    measure: str,
    *,
    higher_is_better: bool,
    confidence: float,
    pairs: Sequence[tuple[str, str]] | None,
) -> list[Pair]:
    """Every two of ``entrants``, or ``pairs`` alone, on the same items, and on the same seeds where both have several.

    Raises `ConfigError` where two have no item or seed in common.
    """
    chosen = [pair for pair in pairs if set(pair) <= set(entrants)] if pairs is not None else list(itertools.combinations(entrants, 2))
    differences = {pair: interval(_differences(entrants, *pair, measure), confidence) for pair in chosen}
    adjusted = holm({"\0".join(pair): difference.p for pair, difference in differences.items()})
    found = []
    for (first, second), difference in differences.items():
        p = adjusted[f"{first}\0{second}"]
        better = None
        if p < 1 - confidence:
            better = first if (difference.value > 0) == higher_is_better else second
        found.append(Pair(first, second, difference, p, better))
    return found


def _differences(entrants: Mapping[str, Sequence[Result]], first: str, second: str, measure: str) -> Matrix:
    """First minus second [S, I], of the items and seeds that both have; who has one seed alone is the same beside all of the other's."""
    sides = [list(entrants[first]), list(entrants[second])]
    if all(len(side) > 1 for side in sides):
        shared = {result.seed for result in sides[0]} & {result.seed for result in sides[1]}
        sides = [[result for result in side if result.seed in shared] for side in sides]
    if not all(sides):
        raise ConfigError(f"{first} and {second} have no seed in common: run those that are missing")
    found = [matrices(side, measure) for side in sides]
    names = [name for name in found[0][0] if name in set(found[1][0])]
    if not names:
        raise ConfigError(
            f"{first} and {second} were tested on different questions: remove the results of one of them, to be measured again"
        )
    figures = []
    for known, numerators, denominators in found:
        columns = [known.index(name) for name in names]
        figures.append(ratios(numerators[:, columns], denominators[:, columns]))
    return figures[0] - figures[1]


def words(pair: Pair, measure: str, confidence: float) -> str:
    """A pair as a sentence, with how sure it is."""
    difference, shown = pair.difference, _Scale.of(measure)
    if pair.better == pair.second:
        difference = replace(difference, value=-difference.value, low=-difference.high, high=-difference.low)
    first, second = (pair.second, pair.first) if pair.better == pair.second else (pair.first, pair.second)
    sure = f"{confidence:.0%} interval {shown.text(difference.low)} to {shown.text(difference.high)}, p = {pair.p:.2g}"
    if pair.better is None:
        return f"no difference between {first} and {second}: {shown.text(difference.value)} {shown.unit} ({sure})"
    return f"{first} is better than {second}: {shown.text(difference.value)} {shown.unit} ({sure})"


def title(measure: str) -> str:
    return measure.replace("_", " ")


@dataclass(frozen=True, slots=True)
class _Scale:
    unit: str
    factor: float
    digits: int

    @classmethod
    def of(cls, measure: str) -> _Scale:
        return cls("points", 100.0, 1) if is_share(measure) else cls(title(measure), 1.0, 4)

    def text(self, value: float) -> str:
        return f"{self.factor * value:+.{self.digits}f}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def to_json(rows: Sequence[Row], pairs: Sequence[Pair], measure: str, confidence: float) -> dict[str, Any]:
    """The table as plain data."""

    def plain(value: Interval) -> dict[str, float | int]:
        return {item.name: getattr(value, item.name) for item in fields(Interval)}

    return {
        "decide_by": measure,
        "confidence": confidence,
        "rows": [
            {
                "name": row.name,
                "is_reference": row.is_reference,
                "learning_rate": row.learning_rate,
                "seeds": list(row.seeds),
                "tested": {name: plain(value) for name, value in row.tested.items()},
                "figures": dict(row.figures),
                "spent": dict(row.spent),
                "tried": dict(row.tried),
                "cost": dict(row.cost),
            }
            for row in rows
        ],
        "pairs": [
            {
                "first": pair.first,
                "second": pair.second,
                "difference": plain(pair.difference),
                "p_adjusted": pair.p,
                "better": pair.better,
                "verdict": words(pair, measure, confidence),
            }
            for pair in pairs
        ],
    }
