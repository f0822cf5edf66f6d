"""What a metric is made of, item by item: enough for its value, its standard error and a paired comparison.

Shape suffixes: ``I`` items, ``C`` columns, ``R`` resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bbopd.evaluate.statistics import Estimate, ratio

RESAMPLES = 2000
_SEED = 20_179

Aggregate = Callable[[np.ndarray, np.ndarray], float]  # a table [I, C], and how often each of its rows counts [I], to one number


def weighted_ratio(table_IC: np.ndarray, weight_I: np.ndarray) -> float:
    """First column over second, both added up: a mean where the second is 1."""
    above, below = weight_I @ table_IC
    return float(above / below) if below else 0.0


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One metric of one model: a row of ``table`` [items, columns] for each item, and how rows become a number.

    ``clusters`` names what an item belongs to (its document, say), as those of one cluster are not independent; empty: each stands for
    itself. ``is_comparable`` is False where another model's number means something else (a perplexity per token). ``draws`` is how often
    items are resampled.
    """

    items: tuple[str, ...]
    table: np.ndarray
    aggregate: Aggregate = weighted_ratio
    clusters: tuple[str, ...] = ()
    higher_is_better: bool = True
    is_comparable: bool = True
    draws: int = RESAMPLES

    @classmethod
    def mean(cls, items: Sequence[str], values: Sequence[float], *, clusters: Sequence[str] = (), higher_is_better: bool = True) -> Scores:
        """The plain mean of one value an item."""
        table = np.column_stack([np.asarray(values, np.float64), np.ones(len(values))])
        return cls(tuple(items), table, clusters=tuple(clusters), higher_is_better=higher_is_better)

    @property
    def is_mean(self) -> bool:
        """Whether it is the plain mean of the first column."""
        return self.aggregate is weighted_ratio and bool((self.table[:, 1] == 1).all())

    @property
    def is_zero_or_one(self) -> bool:
        """Whether every item is simply right or wrong."""
        return self.is_mean and bool(np.isin(self.table[:, 0], (0, 1)).all())

    def estimate(self) -> Estimate:
        """The value over all items; its standard error is clustered, a ratio's linearised, else a bootstrap's, and None for one cluster."""
        if self.aggregate is weighted_ratio:
            return ratio(*self._cluster_sums().T.tolist())
        value = self.aggregate(self.table, np.ones(len(self.items)))
        if len(set(self.clusters or self.items)) < 2:
            return Estimate(value, None)
        return Estimate(value, float(np.std([self.aggregate(self.table, weight_I) for weight_I in self.resamples()], ddof=1)))

    def resamples(self) -> Iterator[np.ndarray]:
        """How often each item is drawn [I], ``draws`` times: clusters with replacement, the same draws for the same clusters."""
        random = np.random.default_rng(_SEED)
        number_I = self._cluster_numbers()
        clusters = int(number_I.max()) + 1
        for _ in range(self.draws):
            yield np.bincount(random.integers(clusters, size=clusters), minlength=clusters)[number_I].astype(np.float64)

    def only(self, items: Sequence[str]) -> Scores:
        """The same metric on some of its items, in the order given."""
        place = {item: index for index, item in enumerate(self.items)}
        rows = [place[item] for item in items]
        clusters = tuple(self.clusters[row] for row in rows) if self.clusters else ()
        return replace(self, items=tuple(items), table=self.table[rows], clusters=clusters)

    def _cluster_numbers(self) -> np.ndarray:
        numbers: dict[str, int] = {}
        return np.array([numbers.setdefault(name, len(numbers)) for name in self.clusters or self.items])

    def _cluster_sums(self) -> np.ndarray:
        number_I = self._cluster_numbers()
        return np.column_stack([np.bincount(number_I, weights=column) for column in self.table.T])
