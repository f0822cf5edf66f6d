"""Two models on the same items: by how much they differ, and whether that is more than chance."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bbopd.errors import DataError
from bbopd.evaluate.scores import Scores

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class McNemar:
    """Items that one model alone got right, and the exact two-sided p-value of that split."""

    first_only: int
    second_only: int
    p_value: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """``difference`` is the second model's value less the first's, on the ``items`` that both have; ``low`` to ``high`` its 95% interval.

    ``p_value`` is two-sided, of the paired bootstrap. ``mcnemar`` stands where every item is right or wrong.
    """

    first: str
    second: str
    difference: float
    low: float
    high: float
    p_value: float
    items: int
    mcnemar: McNemar | None

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.low <= 0.0 <= self.high

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"is_clear": self.is_clear}


def compare(first: tuple[str, Scores], second: tuple[str, Scores]) -> Comparison:
    """Compare a metric of two models, each given with its name, by a paired bootstrap over clusters (Efron and Tibshirani, 1993, ch. 13).

    Every resample draws the same clusters for both. The p-value is twice the share of resamples on the smaller side of 0, which counts
    itself in (Davison and Hinkley, 1997, eq. 4.11); differences of exactly 0 count on both sides.

    Raises
    ------
    DataError
        The two have no item in common.
    """
    (first_name, a), (second_name, b) = first, second
    known = set(b.items)
    common = [item for item in a.items if item in known]
    if not common:
        raise DataError(f"{first_name} and {second_name} have no item in common, so they cannot be compared in pairs")
    a, b = a.only(common), b.only(common)
    whole_I = np.ones(len(common))
    difference = b.aggregate(b.table, whole_I) - a.aggregate(a.table, whole_I)
    found_R = np.array([b.aggregate(b.table, weight_I) - a.aggregate(a.table, weight_I) for weight_I in a.resamples()])
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(bound) for bound in np.quantile(found_R, (tail, 1 - tail)))
    smaller = min(int((found_R <= 0).sum()), int((found_R >= 0).sum()))
    p_value = min(1.0, 2 * (smaller + 1) / (a.draws + 1))
    test = mcnemar(a, b) if a.is_zero_or_one and b.is_zero_or_one else None
    return Comparison(first_name, second_name, difference, low, high, p_value, len(common), test)


def mcnemar(a: Scores, b: Scores) -> McNemar:
    """The exact test (McNemar, 1947; binomial): of the items that one alone got right, each should have as many.

    ``a`` and ``b`` hold 0 or 1 for the same items in the same order.
    """
    first_only = int(((a.table[:, 0] == 1) & (b.table[:, 0] == 0)).sum())
    second_only = int(((a.table[:, 0] == 0) & (b.table[:, 0] == 1)).sum())
    count, fewer = first_only + second_only, min(first_only, second_only)
    tail = sum(math.comb(count, k) for k in range(fewer + 1))
    return McNemar(first_only, second_only, min(1.0, 2 * tail / 2**count))
