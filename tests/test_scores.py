"""Standard errors, paired differences and length control against scipy, hand counts and simulated verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bbopd.errors import DataError
from bbopd.evaluate.length_control import length_controlled
from bbopd.evaluate.paired import compare, mcnemar
from bbopd.evaluate.scores import Scores

RANDOM = np.random.default_rng(0)


def means(values: np.ndarray, clusters: tuple[str, ...] = ()) -> Scores:
    return Scores.mean([str(index) for index in range(len(values))], values.tolist(), clusters=clusters)


def as_bootstrap(scores: Scores) -> Scores:
    """The same numbers through the general path."""
    return Scores(scores.items, scores.table, lambda table, weight: float(weight @ table[:, 0] / (weight @ table[:, 1])), scores.clusters)


def test_standard_error_of_a_mean_is_the_textbooks() -> None:
    values = RANDOM.normal(2, 3, size=60)
    found = means(values).estimate()
    assert found.value == pytest.approx(values.mean())
    assert found.standard_error == pytest.approx(values.std(ddof=1) / math.sqrt(60))
    assert means(values[:1]).estimate().standard_error is None
    assert as_bootstrap(means(values[:1])).estimate().standard_error is None


def test_clusters_count_as_one_draw() -> None:
    """Ten copies of each number say no more than one does."""
    values = RANDOM.normal(size=40)
    copied = means(np.repeat(values, 10), tuple(str(index // 10) for index in range(400)))
    expected = means(values).estimate()
    assert copied.estimate().value == pytest.approx(expected.value)
    assert copied.estimate().standard_error == pytest.approx(expected.standard_error)
    assert expected.standard_error is not None
    assert as_bootstrap(copied).estimate().standard_error == pytest.approx(expected.standard_error, rel=0.1)


def test_paired_difference_sees_what_unpaired_errors_hide() -> None:
    """Items differ much more than the two models do: the interval holds the true difference and leaves out 0."""
    hard = RANDOM.normal(0, 5, size=200)
    noise = RANDOM.normal(0.5, 0.2, size=200)
    first, second = means(hard), means(hard + noise)
    found = compare(("a", first), ("b", second))
    assert found.difference == pytest.approx(noise.mean())
    half = 1.96 * noise.std(ddof=1) / math.sqrt(200)
    assert (found.low, found.high) == (pytest.approx(noise.mean() - half, abs=half / 4), pytest.approx(noise.mean() + half, abs=half / 4))
    assert found.is_clear
    assert found.p_value == pytest.approx(2 / 2001)
    assert (first.estimate().standard_error or 0) > 5 * half
    itself = compare(("a", first), ("a again", first))
    assert (itself.difference, itself.p_value, itself.is_clear) == (0.0, 1.0, False)


def test_items_are_matched_by_name() -> None:
    first = Scores.mean(["x", "y", "z"], [1.0, 2.0, 3.0])
    second = Scores.mean(["z", "w", "y"], [5.0, 100.0, 2.0])
    found = compare(("a", first), ("b", second))
    assert (found.items, found.difference) == (2, pytest.approx(1.0))
    with pytest.raises(DataError, match="a and b have no item in common"):
        compare(("a", first), ("b", Scores.mean(["q"], [1.0])))


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (1, 0), (3, 11), (40, 60), (700, 800)])
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int) -> None:
    stats = pytest.importorskip("scipy.stats")
    first = np.array([1.0] * only_first + [0.0] * only_second + [1.0, 0.0])
    second = np.array([0.0] * only_first + [1.0] * only_second + [1.0, 0.0])
    found = mcnemar(means(first), means(second))
    assert (found.first_only, found.second_only) == (only_first, only_second)
    expected = stats.binomtest(only_first, only_first + only_second).pvalue if only_first + only_second else 1.0
    assert found.p_value == pytest.approx(expected)


def test_mcnemar_stands_beside_right_and_wrong_alone() -> None:
    right = Scores.mean(["a", "b"], [1.0, 0.0])
    assert compare(("1", right), ("2", right)).mcnemar is not None
    assert compare(("1", right), ("2", Scores.mean(["a", "b"], [0.5, 0.0]))).mcnemar is None


def verdicts(quality: float, by_length: float, count: int = 4000) -> np.ndarray:
    """Verdicts of a judge that likes length: [pairs, 2], the second column characters."""
    longer = RANDOM.normal(20, 40, size=count)
    p = 1 / (1 + np.exp(-(quality + by_length * np.tanh(longer / longer.std()))))
    return np.column_stack([(RANDOM.random(count) < p).astype(np.float64), longer])


def test_length_control_finds_the_win_rate_at_equal_length() -> None:
    """Longer answers win though they are no better, and better ones win less than their length makes it seem."""
    ones = np.ones(4000)
    no_better = verdicts(0.0, 2.0)
    assert no_better[:, 0].mean() > 0.57
    assert length_controlled(no_better, ones) == pytest.approx(0.5, abs=0.06)
    better = verdicts(1.0, 2.0)
    assert length_controlled(better, ones) == pytest.approx(1 / (1 + math.exp(-1)), abs=0.06)
    fair = verdicts(0.4, 0.0)
    assert length_controlled(fair, ones) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.06)


def test_length_control_is_the_regressions_optimum() -> None:
    """The penalised likelihood of fractional verdicts has no slope at what is found: scipy's minimum is the same."""
    optimize = pytest.importorskip("scipy.optimize")
    table = np.column_stack([RANDOM.choice([0, 0.25, 0.5, 0.75, 1], size=50), RANDOM.normal(10, 30, size=50)])
    weight = RANDOM.integers(0, 3, size=50).astype(np.float64)
    mean = weight @ table[:, 1] / weight.sum()
    x = np.tanh(table[:, 1] / math.sqrt(weight @ (table[:, 1] - mean) ** 2 / weight.sum()))

    def loss(slopes: np.ndarray) -> float:
        z = slopes[0] + slopes[1] * x
        return float(weight @ (np.logaddexp(0, z) - table[:, 0] * z) + 1e-3 * weight.sum() * slopes[1] ** 2 / 2)

    best = optimize.minimize(loss, np.zeros(2), method="BFGS", options={"gtol": 1e-8}).x
    assert length_controlled(table, weight) == pytest.approx(1 / (1 + math.exp(-best[0])), abs=1e-5)


def test_length_control_without_anything_to_control() -> None:
    ones = np.ones(4)
    assert length_controlled(np.array([[1.0, 5.0], [1.0, 9.0], [1.0, 0.0], [1.0, -4.0]]), ones) == 1.0
    assert length_controlled(np.array([[1.0, 5.0], [0.0, 5.0], [1.0, 5.0], [1.0, 5.0]]), ones) == 0.75
    separated = np.array([[1.0, 5.0], [1.0, 5.0], [0.0, -5.0], [0.0, -5.0]])  # length explains all of it
    assert length_controlled(separated, ones) == pytest.approx(0.5)
