"""Student's t-distribution, by its incomplete beta function: all that intervals and tests on few runs need."""

from __future__ import annotations

import math

_TINY = 1e-300
_TERMS = 500


def two_sided(t: float, freedom: float) -> float:
    """P(abs(T) >= abs(t)) for ``freedom`` degrees, any positive number."""
    return 1.0 if t == 0 else _incomplete_beta(freedom / (freedom + t * t), freedom / 2, 0.5)


def quantile(probability: float, freedom: float) -> float:
    """t with P(T <= t) = ``probability``, which lies between 0.5 and 1."""
    if not 0.5 <= probability < 1:
        raise ValueError(f"a quantile of probability {probability}: it must lie in [0.5, 1)")
    tail = 2 * (1 - probability)
    low, high = 0.0, 1.0
    while two_sided(high, freedom) > tail:
        low, high = high, 2 * high
    while high - low > 1e-10 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if two_sided(middle, freedom) > tail else (low, middle)
    return high


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """I_x(a, b), regularised, by Lentz's continued fraction (Numerical Recipes, 3rd ed., section 6.4)."""
    if x >= 1:
        return 1.0
    if x > (a + 1) / (a + b + 2):
        return 1.0 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)) / a
    c, d = 1.0, 1.0 / _not_zero(1 - (a + b) * x / (a + 1))
    fraction = d
    for m in range(1, _TERMS):
        for numerator in (m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)), -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))):
            d = 1.0 / _not_zero(1 + numerator * d)
            c = _not_zero(1 + numerator / c)
            fraction *= d * c
        if abs(d * c - 1) < 1e-14:
            break
    return front * fraction


def _not_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
