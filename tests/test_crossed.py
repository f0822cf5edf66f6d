"""Intervals over seeds and items: right on average where the truth is known, and Student's distribution to many digits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bbopd.evaluate.crossed import holm, interval, ratios
from bbopd.evaluate.statistics import ratio
from bbopd.evaluate.student_t import quantile, two_sided


@pytest.mark.parametrize("freedom", [1.0, 2.0, 2.7, 10.0, 199.0])
@pytest.mark.parametrize("t", [0.3, 1.0, 2.5, 9.0])
def test_student_tails_against_the_integral(freedom: float, t: float) -> None:
    """The density, integrated: with s = t + u / (1 - u), from u = 0 to 1."""
    u, weights = np.polynomial.legendre.leggauss(400)
    u, weights = (u + 1) / 2, weights / 2
    s = t + u / (1 - u)
    log_front = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - math.log(freedom * math.pi) / 2
    density = np.exp(log_front - (freedom + 1) / 2 * np.log1p(s**2 / freedom))
    tail = 2 * float((weights * density / (1 - u) ** 2).sum())
    assert two_sided(t, freedom) == pytest.approx(tail, rel=1e-7)
    assert two_sided(-t, freedom) == two_sided(t, freedom)


def test_student_quantiles() -> None:
    """Closed forms: of one degree the Cauchy distribution; of two t / sqrt(2 + t^2)."""
    assert quantile(0.975, 1.0) == pytest.approx(math.tan(math.pi * 0.475), rel=1e-9)
    assert quantile(0.975, 2.0) == pytest.approx(0.95 * math.sqrt(2 / (1 - 0.95**2)), rel=1e-9)
    assert quantile(0.975, 1e7) == pytest.approx(1.959964, rel=1e-5)
    with pytest.raises(ValueError, match=r"probability 0\.2"):
        quantile(0.2, 3)


def covered(draw, seeds: int, items: int, trials: int) -> float:
    """How often 95% intervals hold the true mean, 0."""
    random = np.random.default_rng(7)
    found = [interval(draw(random, seeds, items), 0.95) for _ in range(trials)]
    return sum(one.low <= 0 <= one.high for one in found) / trials


def covered_by_bootstrap(draw, seeds: int, items: int, trials: int) -> float:
    """The same of percentile intervals, where seeds and items are drawn again, each among themselves."""
    random = np.random.default_rng(7)
    hits = 0
    for _ in range(trials):
        x_SI = draw(random, seeds, items)
        times_S = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=400) / seeds
        times_I = random.multinomial(items, np.full(items, 1 / items), size=400) / items
        low, high = np.quantile(((times_S @ x_SI) * times_I).sum(axis=1), [0.025, 0.975])
        hits += low <= 0 <= high
    return hits / trials


def normal(seed_spread: float, item_spread: float):
    def draw(random: np.random.Generator, seeds: int, items: int) -> np.ndarray:
        return (
            seed_spread * random.normal(size=(seeds, 1)) + item_spread * random.normal(size=(1, items)) + random.normal(size=(seeds, items))
        )

    return draw


def test_coverage_where_seeds_differ() -> None:
    """Three runs that differ by as much as their questions: only Student's t with about two degrees is wide enough."""
    draw = normal(0.5, 0.5)
    assert 0.91 <= covered(draw, seeds=3, items=60, trials=1000) <= 0.98
    assert covered_by_bootstrap(draw, seeds=3, items=60, trials=300) < 0.87


@pytest.mark.parametrize(("seed_spread", "item_spread"), [(0.0, 1.0), (0.0, 0.0), (0.2, 1.0)])
def test_coverage_elsewhere(seed_spread: float, item_spread: float) -> None:
    """Never too narrow, whichever part of the variance there is."""
    assert covered(normal(seed_spread, item_spread), seeds=3, items=60, trials=400) >= 0.92


def test_one_seed_is_the_t_test_over_items() -> None:
    x = np.random.default_rng(0).normal(0.3, 1, size=40)
    found = interval(x[None, :], 0.95)
    error = x.std(ddof=1) / math.sqrt(40)
    assert found.value == pytest.approx(x.mean())
    assert found.high - found.value == pytest.approx(quantile(0.975, 39) * error)
    assert found.p == pytest.approx(two_sided(x.mean() / error, 39))


def test_equal_figures_have_no_width() -> None:
    same = interval(np.zeros((3, 10)), 0.95)
    assert (same.value, same.low, same.high, same.p) == (0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="0 items"):
        interval(np.zeros((3, 0)), 0.95)


def test_ratios_have_the_ratio_and_its_error() -> None:
    """Of one seed the same as `statistics.ratio`, whose standard error is the linearised one."""
    random = np.random.default_rng(1)
    bytes_I = random.integers(5, 50, size=30).astype(float)
    bits_I = bytes_I * random.uniform(0.5, 1.5, size=30)
    expected = ratio(list(bits_I), list(bytes_I))
    assert expected.standard_error is not None
    found = interval(ratios(bits_I[None, :], bytes_I[None, :]), 0.95)
    assert found.value == pytest.approx(expected.value)
    assert found.high - found.value == pytest.approx(quantile(0.975, 29) * expected.standard_error)
    with pytest.raises(ValueError, match="positive sum"):
        ratios(np.ones((1, 2)), np.zeros((1, 2)))


def test_holm_by_hand() -> None:
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert holm({"a": 0.7, "b": 0.9}) == pytest.approx({"a": 1.0, "b": 1.0})
