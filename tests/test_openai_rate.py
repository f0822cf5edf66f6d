"""A client's own rate limits, by a clock of the test's own."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.teachers.openai_rate import RateLimits


@pytest.mark.parametrize("seed", range(10))
def test_no_minute_has_more_than_the_rate_and_a_tenth(seed):
    """However requests come: within any 60 s at most the rate, a tenth of it more, and one request of any size."""
    random = np.random.default_rng(seed)
    now = 0.0
    rates = RateLimits(120, 6000, clock=lambda: now)
    made: list[tuple[float, int]] = []
    for _ in range(600):
        now += random.exponential(random.choice([0.01, 0.3]))
        tokens = int(random.integers(1, 900))
        made.append((now + rates.take(tokens), tokens))
    at = np.array([when for when, _ in made])
    sizes = np.array([tokens for _, tokens in made])
    for start in at:
        within = (at >= start) & (at < start + 60)
        assert within.sum() <= 120 * 1.1 + 1
        assert sizes[within].sum() <= 6000 * 1.1 + sizes.max()
    assert (np.diff(at) >= -1e-9).all(), "in the order of asking"


def test_a_steady_stream_below_the_rate_never_waits():
    now = 0.0
    rates = RateLimits(60, 6000, clock=lambda: now)
    for _ in range(200):
        assert rates.take(100) == 0.0
        now += 1.0


def test_one_request_larger_than_a_burst_goes_and_is_made_up_for():
    rates = RateLimits(None, 600, clock=lambda: 0.0)
    assert rates.take(3000) == 0.0
    assert rates.take(1) == pytest.approx((3000 - 60 + 1) / 10)


def test_nothing_is_limited_unless_told():
    rates = RateLimits(clock=lambda: 0.0)
    assert [rates.take(10**9) for _ in range(100)] == [0.0] * 100
