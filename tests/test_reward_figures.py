"""Figures of rewards against NumPy, over judged rollouts alone."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.pipeline.reward_figures import reward_figures
from bbopd.types import Prompt, Reward, Rollout, ScoredRollout, TeacherSignal


def judged(length: int, value: float, std: float = 1.0, **parts: float) -> ScoredRollout:
    rollout = Rollout("r", Prompt("p", (1,)), (1,) * length)
    return ScoredRollout(rollout, TeacherSignal("text", advantages=np.zeros(length, np.float32)), Reward(value, parts), std)


def test_they_are_those_of_the_judged_rollouts() -> None:
    random = np.random.default_rng(0)
    lengths, values = random.integers(1, 50, 12), random.normal(size=12)
    items = [
        judged(int(length), value, std=float(n % 3), style=2 * value) for n, (length, value) in enumerate(zip(lengths, values, strict=True))
    ]
    labelled = Rollout("l", Prompt("p", (1,)), (1,) * 90, origin="reference")
    found = reward_figures([*items, labelled, ScoredRollout(labelled, TeacherSignal("text"))])
    assert found == {
        "reward_mean": pytest.approx(values.mean()),
        "reward_std": pytest.approx(values.std()),
        "reward_style": pytest.approx(2 * values.mean()),
        "zero_spread_share": pytest.approx(4 / 12),
        "reward_length_correlation": pytest.approx(np.corrcoef(values, lengths)[0, 1]),
    }


def test_without_rewards_or_variation_nothing_is_made_up() -> None:
    assert reward_figures([Rollout("r", Prompt("p", (1,)), (1,))]) == {}
    assert "reward_length_correlation" not in reward_figures([judged(3, 1.0), judged(3, 2.0)])
    assert "reward_length_correlation" not in reward_figures([judged(3, 1.0), judged(4, 1.0)])
