"""Ratios over sequences, with standard errors that respect that the tokens of one sequence are not independent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Estimate:
    """``value`` and its standard error, which is None for fewer than two sequences."""

    value: float
    standard_error: float | None


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """``sum(numerators) / sum(denominators)``: a token-weighted mean where they are a sequence's sum and its tokens.

    The standard error takes sequences as clusters, with the linearised variance of a ratio estimator (Cochran, Sampling
    Techniques, 3rd ed., eq. 6.13, without the finite-population term): ``sqrt(S / (S - 1) * sum((x_s - r * n_s)^2)) / sum(n_s)``.

    Raises
    ------
    ValueError
        The lengths differ, or the denominators add up to nothing.
    """
    total = math.fsum(denominators)
    if len(numerators) != len(denominators) or not total > 0:
        given = f"{len(numerators)} numerators, {len(denominators)} denominators that add up to {total}"
        raise ValueError(f"a ratio needs as many numerators as denominators, and a positive sum of these; got {given}")
    value = math.fsum(numerators) / total
    count = len(numerators)
    if count < 2:
        return Estimate(value, None)
    squares = math.fsum((x - value * n) ** 2 for x, n in zip(numerators, denominators, strict=True))
    return Estimate(value, math.sqrt(count / (count - 1) * squares) / total)
