"""How far two answers lie apart, against the definition in float64 over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.teachers.replicas import largest_difference, total_variation
from bbopd.types import TeacherSignal

L, V, K = 9, 40, 6


def distributions(seed: int) -> np.ndarray:
    z = np.random.default_rng(seed).standard_normal((L, V)) * 2.0
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def as_topk(logprobs: np.ndarray, ids: np.ndarray) -> TeacherSignal:
    chosen = np.take_along_axis(logprobs, ids, 1)
    log_tail = np.log1p(-np.exp(chosen).sum(axis=1))
    return TeacherSignal("topk", 1.0, ids=ids.astype(np.int32), logprobs=chosen, log_tail=log_tail, sampled=logprobs[:, 0])


def test_full_answers_differ_by_the_total_variation():
    p, q = distributions(0), distributions(1)
    expected = 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(axis=1)
    shift = np.random.default_rng(2).standard_normal((L, 1))
    first, other = TeacherSignal("full", logits=p + shift), TeacherSignal("full", logits=q - shift)
    np.testing.assert_allclose(total_variation(first, other), expected, rtol=1e-12)
    assert largest_difference([first, first, other]) == pytest.approx(expected.max())
    assert largest_difference([first]) == largest_difference([first, first]) == 0.0


@pytest.mark.parametrize("shared", [0, 2, 6])
def test_topk_answers_differ_by_the_total_variation_of_what_both_name(shared):
    p, q = distributions(3), distributions(4)
    random = np.random.default_rng(5)
    order = np.stack([random.permutation(V) for _ in range(L)])
    first_ids = order[:, :K]
    other_ids = np.concatenate([first_ids[:, ::-1][:, :shared], order[:, K : 2 * K - shared]], axis=1)
    named = first_ids[:, ::-1][:, :shared]
    a, b = np.exp(np.take_along_axis(p, named, 1)), np.exp(np.take_along_axis(q, named, 1))
    expected = 0.5 * (np.abs(a - b).sum(axis=1) + np.abs((1 - a.sum(axis=1)) - (1 - b.sum(axis=1))))
    np.testing.assert_allclose(total_variation(as_topk(p, first_ids), as_topk(q, other_ids)), expected, rtol=1e-9, atol=1e-12)
    assert (expected <= 0.5 * np.abs(np.exp(p) - np.exp(q)).sum(axis=1) + 1e-12).all(), "a lower bound of the whole"


def test_empty_slots_are_shared_by_nobody():
    p = distributions(6)
    ids = np.tile(np.arange(K), (L, 1))
    first = as_topk(p, ids)
    holes = ids.copy()
    holes[:, -1] = -1
    logprobs = np.where(holes < 0, -np.inf, first.logprobs)
    other = TeacherSignal("candidates", 1.0, ids=holes, logprobs=logprobs, log_tail=np.log1p(-np.exp(logprobs).sum(axis=1)))
    np.testing.assert_allclose(total_variation(other, other), 0.0, atol=1e-15)
    np.testing.assert_allclose(total_variation(first, other), 0.0, atol=1e-12)


def test_sampled_answers_differ_by_the_probability_of_the_token():
    p, q = distributions(7)[:, 0], distributions(8)[:, 0]
    first, other = TeacherSignal("sampled", sampled=p), TeacherSignal("sampled", sampled=q)
    np.testing.assert_allclose(total_variation(first, other), np.abs(np.exp(p) - np.exp(q)), rtol=1e-12)
