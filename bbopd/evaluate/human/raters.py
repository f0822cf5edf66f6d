"""How far several people agree: Krippendorff's alpha for values that have an order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def ordinal_alpha(units: Iterable[Sequence[float]]) -> float | None:
    """Krippendorff's alpha of ordinal data: 1 where raters always agree, 0 where they agree as chance would, below that less.

    Parameters
    ----------
    units
        For each thing that was judged, the values that its raters gave; those with fewer than two say nothing and are passed over.

    Returns
    -------
    float or None
        None where no unit has two values, or all values are the same, so that there is nothing to agree on.

    Notes
    -----
    Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section E: coincidences ``o_ck`` of values c and k within
    units, each unit weighed by 1 / (its values - 1), and the ordinal difference ``(sum_{g=c..k} n_g - (n_c + n_k) / 2)^2``.
    """
    paired = [np.asarray(values, dtype=np.float64) for values in units if len(values) > 1]
    if not paired:
        return None
    levels = np.unique(np.concatenate(paired))
    coincidences = np.zeros((len(levels), len(levels)))
    for values in paired:
        counts = (values[:, None] == levels).sum(axis=0)
        coincidences += (np.outer(counts, counts) - np.diag(counts)) / (len(values) - 1)
    totals = coincidences.sum(axis=1)
    middles = np.cumsum(totals) - totals / 2
    differences = (middles[:, None] - middles) ** 2
    expected = (np.outer(totals, totals) - np.diag(totals)) / (totals.sum() - 1)
    by_chance = float((expected * differences).sum())
    return 1.0 - float((coincidences * differences).sum()) / by_chance if by_chance else None
