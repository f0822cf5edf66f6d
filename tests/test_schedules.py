"""Learning rate and loss weights, at every step, against the values written out by hand."""

from __future__ import annotations

import math

import pytest

from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.trainer import learning_rate_at, loss_weights_at


def rates(steps: int, planned: int, **options) -> list[float]:
    train = TrainConfig(lr=1.0, **options)
    return [learning_rate_at(step, planned, train) for step in range(steps)]


def test_warmup_rises_in_equal_steps_and_constant_stays():
    assert rates(8, 8, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(8, 8, warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1])
    assert rates(3, 8, warmup=0) == [1.0, 1.0, 1.0]


def test_linear_reaches_zero_just_after_the_last_step_and_never_goes_below():
    assert rates(10, 8, warmup=4, schedule="linear") == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25, 0.25, 0.25])


def test_cosine():
    expected = [0.5, 1.0, *(0.5 * (1 + math.cos(math.pi * k / 6)) for k in (0, 1, 2, 3, 4, 5, 5))]
    assert rates(9, 8, warmup=2, schedule="cosine") == pytest.approx(expected)


def test_a_warmup_as_long_as_the_run_and_a_longer_run():
    assert rates(6, 4, warmup=1.0, schedule="cosine") == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def weights(steps: int, planned: int, **options) -> list[tuple[float, float]]:
    objective = ObjectiveConfig(**options)
    return [loss_weights_at(step, planned, objective) for step in range(steps)]


def test_the_kd_ramp_leaves_ce_alone():
    found = weights(7, 10, alpha=0.4, ramp=4)
    assert [ce for ce, _ in found] == [0.4] * 7
    assert [kd for _, kd in found] == pytest.approx([0.0, 0.15, 0.3, 0.45, 0.6, 0.6, 0.6])
    assert weights(5, 10, alpha=0.4, ramp=0.4) == weights(5, 10, alpha=0.4, ramp=4)


def test_the_literal_alpha_ramp_moves_both():
    found = weights(4, 10, alpha=0.4, ramp=2, ramp_kind="alpha")
    assert [ce for ce, _ in found] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert [kd for _, kd in found] == pytest.approx([1.0, 0.8, 0.6, 0.6])


def test_without_a_ramp_and_with_weights_of_their_own():
    assert weights(2, 10, ce_weight=1.0, kd_weight=3.0, ramp=0) == [(1.0, 3.0), (1.0, 3.0)]
    assert weights(2, 10, ce_weight=1.0, kd_weight=3.0, ramp=2) == [(1.0, 0.0), (1.0, 1.5)]


def test_sft_has_no_ramp():
    assert weights(2, 10, name="sft", ramp=5) == [(1.0, 0.0), (1.0, 0.0)]
