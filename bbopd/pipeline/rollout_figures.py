"""What metrics.jsonl says of the student's own answers in a step, and of those that were turned away until then."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from bbopd.data.assemble import Item, rollout_of


def rollout_figures(items: Iterable[Item], rejected: Mapping[str, int]) -> dict[str, Any]:
    """Of the rollouts among ``items``, ``rollout_length_mean`` in tokens, and ``truncated_share``: those that ended at the limit of length.

    ``rejected``: sequences turned away so far, by reason, where there are any.
    """
    figures: dict[str, Any] = {"rejected": dict(rejected)} if rejected else {}
    rollouts = [rollout for rollout in map(rollout_of, items) if not rollout.is_labelled]
    if rollouts:
        figures["rollout_length_mean"] = float(np.mean([len(rollout) for rollout in rollouts]))
        figures["truncated_share"] = float(np.mean([rollout.finish_reason == "length" for rollout in rollouts]))
    return figures
