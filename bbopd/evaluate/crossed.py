"""Means over seeds and items at once, with intervals for both: the runs of an arm are a sample, and so are the questions asked.

Shape suffixes: ``S`` seeds, ``I`` items.

A figure ``x[s, i]`` of seed *s* on item *i* is taken as grand mean + seed + item + rest, the two-way random layout (Scheffé, The Analysis
of Variance, chapter 7). The variance of the mean is estimated by ``(MS_seed + MS_item - MS_rest) / (S I)``, its degrees of freedom as
Satterthwaite (1946) has them. With three seeds the t-distribution has to be as wide as that makes it: a bootstrap that draws three seeds
out of three covers too little (a test measures both).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bbopd.evaluate.student_t import quantile, two_sided

Matrix = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """``value`` with a confidence interval, and the probability of a mean as far from 0 where the true one is 0."""

    value: float
    low: float
    high: float
    p: float
    seeds: int
    items: int


def ratios(numerators_SI: Matrix, denominators_SI: Matrix) -> Matrix:
    """Figures [S, I] whose mean is ``sum(numerators) / sum(denominators)``, linearised as in `statistics.ratio`.

    Raises `ValueError` for shapes that differ or denominators that add up to nothing.
    """
    if numerators_SI.shape != denominators_SI.shape or not denominators_SI.sum() > 0:
        raise ValueError(
            f"numerators {numerators_SI.shape} over denominators {denominators_SI.shape}: need the same shape and a positive sum"
        )
    value = numerators_SI.sum() / denominators_SI.sum()
    return value + (numerators_SI - value * denominators_SI) / denominators_SI.mean()


def interval(x_SI: Matrix, confidence: float) -> Interval:
    """The mean of ``x_SI`` for other seeds and other items than these; of one seed, for other items alone. `ValueError` without figures."""
    seeds, items = x_SI.shape
    if not seeds or not items:
        raise ValueError(f"figures of {seeds} seeds and {items} items have no mean")
    mean = float(x_SI.mean())
    variance, freedom = _variance_of_mean(x_SI)
    error = math.sqrt(variance)
    if error == 0.0:
        return Interval(mean, mean, mean, 0.0 if mean else 1.0, seeds, items)
    half = quantile((1 + confidence) / 2, freedom) * error
    return Interval(mean, mean - half, mean + half, two_sided(mean / error, freedom), seeds, items)


def _variance_of_mean(x_SI: Matrix) -> tuple[float, float]:
    """The variance of the grand mean, and its degrees of freedom."""
    seeds, items = x_SI.shape
    mean = x_SI.mean()
    item_means, seed_means = x_SI.mean(axis=0), x_SI.mean(axis=1)
    item_square = seeds * float(np.square(item_means - mean).sum()) / max(1, items - 1)
    if seeds == 1:
        return item_square / items, max(1.0, items - 1.0)
    seed_square = items * float(np.square(seed_means - mean).sum()) / (seeds - 1)
    if items == 1:
        return seed_square / seeds, seeds - 1.0
    rest = x_SI - item_means[None, :] - seed_means[:, None] + mean
    rest_square = float(np.square(rest).sum()) / ((seeds - 1) * (items - 1))
    both = seed_square + item_square - rest_square
    largest = max(seed_square, item_square)
    if both <= largest:  # one of the two shows no variance of its own
        return largest / (seeds * items), float(seeds - 1 if largest == seed_square else items - 1)
    freedom = both**2 / (seed_square**2 / (seeds - 1) + item_square**2 / (items - 1) + rest_square**2 / ((seeds - 1) * (items - 1)))
    return both / (seeds * items), freedom


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Probabilities adjusted for being several (Holm 1979): one below 0.05 stays right in 19 of 20 whole tables."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p}


def as_matrix(rows: Sequence[Sequence[float]]) -> Matrix:
    return np.asarray(rows, dtype=np.float64)
