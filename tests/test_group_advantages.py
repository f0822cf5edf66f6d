"""Advantages against their formula, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.objectives.group_advantages import group_advantages, group_std


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("size", [2, 3, 8, 64])
def test_they_are_the_formula(size: int, divide_by_std: bool) -> None:
    random = np.random.default_rng(0)
    rewards = random.normal(random.normal() * 10, 3, size)
    mean = sum(rewards.tolist()) / size
    std = (sum((reward - mean) ** 2 for reward in rewards.tolist()) / (size - 1)) ** 0.5
    expected = [(reward - mean) / (std + 1e-6 if divide_by_std else 1.0) for reward in rewards.tolist()]
    found = group_advantages(rewards.tolist(), divide_by_std=divide_by_std)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
    assert group_std(rewards.tolist()) == pytest.approx(std)
    assert abs(found.sum()) < 1e-9


def test_a_constant_or_another_order_changes_nothing_and_a_scale_only_what_is_not_divided() -> None:
    random = np.random.default_rng(0)
    rewards = random.normal(size=8)
    found = group_advantages(rewards.tolist())
    np.testing.assert_allclose(group_advantages((rewards + 1000.0).tolist()), found, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(group_advantages((rewards * 50.0).tolist()), found, rtol=1e-5)
    plain = group_advantages(rewards.tolist(), divide_by_std=False)
    np.testing.assert_allclose(group_advantages((rewards * 50.0).tolist(), divide_by_std=False), 50.0 * plain, rtol=1e-9, atol=1e-11)
    order = random.permutation(8)
    np.testing.assert_allclose(group_advantages(rewards[order].tolist()), found[order], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rewards", [[], [3.7], [0.1] * 3, [1e300] * 5])
@pytest.mark.parametrize("divide_by_std", [True, False])
def test_without_spread_they_are_exactly_zero(rewards: list[float], divide_by_std: bool) -> None:
    assert group_advantages(rewards, divide_by_std=divide_by_std).tolist() == [0.0] * len(rewards)
    assert group_std(rewards) == 0.0
