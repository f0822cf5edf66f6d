"""What metrics.jsonl says of the rewards in a step: how high, how far apart, and whether length alone makes them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from bbopd.data.assemble import Item
from bbopd.types import ScoredRollout


def reward_figures(items: Iterable[Item]) -> dict[str, float]:
    """Of the judged rollouts among ``items``; empty where there is none.

    ``reward_mean``, ``reward_std``, and the mean of every part as ``reward_<name>``; ``zero_spread_share``: rollouts whose group had the
    same reward throughout, from which nothing is learned; ``reward_length_correlation`` (Pearson), left out where either does not vary.
    """
    judged = [item for item in items if isinstance(item, ScoredRollout) and item.reward is not None]
    if not judged:
        return {}
    rewards = [item.reward for item in judged if item.reward is not None]
    values = np.array([reward.value for reward in rewards])
    lengths = np.array([len(item.rollout) for item in judged], np.float64)
    parts: defaultdict[str, list[float]] = defaultdict(list)
    for reward in rewards:
        for name, value in reward.parts.items():
            parts[name].append(value)
    figures = {
        "reward_mean": float(values.mean()),
        "reward_std": float(values.std()),
        **{f"reward_{name}": float(np.mean(known)) for name, known in parts.items()},
        "zero_spread_share": float(np.mean([item.group_std == 0 for item in judged])),
    }
    if np.ptp(values) > 0 and np.ptp(lengths) > 0:
        figures["reward_length_correlation"] = float(np.corrcoef(values, lengths)[0, 1])
    return figures
