"""From rewards of several answers to one prompt to their advantages: an answer is as good as it is better than its siblings.

GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): ``A_i = (r_i - mean(r)) / std(r)``. Without the division it is the advantage of
Dr. GRPO (Liu et al. 2025, arXiv 2503.20783, section 3.2), which leaves prompts of little spread as little weight.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_EPSILON = 1e-6  # of a standard deviation


def group_std(rewards: Sequence[float]) -> float:
    """The standard deviation (n - 1) of a group's rewards; exactly 0 where all are the same, or there is one alone."""
    return float(np.std(rewards, ddof=1)) if len(set(rewards)) > 1 else 0.0


def group_advantages(rewards: Sequence[float], *, divide_by_std: bool = True) -> np.ndarray:
    """The advantage of every answer of a group, float64; exactly 0 in a group without spread, which says nothing of what is better."""
    values = np.asarray(rewards, np.float64)
    std = group_std(rewards)
    if not std:
        return np.zeros_like(values)
    differences = values - values.mean()
    return differences / (std + _EPSILON) if divide_by_std else differences
