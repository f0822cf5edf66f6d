"""Pauses that grow, and a bucket that keeps retries a share of the requests."""

from __future__ import annotations

import numpy as np

from bbopd.teachers.backoff import RetryBudget, backoff


def test_pauses_double_up_to_a_limit_and_are_shortened_at_random():
    for failures in range(1, 60):
        whole = min(15.0, 0.1 * 2.0 ** (failures - 1))
        pauses = [backoff(failures) for _ in range(200)]
        assert whole / 2 <= min(pauses) < 0.6 * whole
        assert 0.9 * whole < max(pauses) <= whole


def test_retries_are_a_share_of_the_requests_and_of_time():
    """Against the bucket written out: however they come, retries made by time t are at most reserve + share * requests + t / s."""
    random = np.random.default_rng(0)
    for trial in range(20):
        now = 0.0
        budget = RetryBudget(share=0.25, reserve=5, per_second=0.5, clock=lambda: now)  # noqa: B023
        requests, made_at = 0, []
        for _ in range(400):
            now += random.exponential(0.2)
            if random.random() < trial / 20:
                requests += 1
                budget.note_request()
            else:
                made_at.append(now + budget.take_retry())
        by_end = sum(at <= now for at in made_at)
        assert by_end <= 5 + 0.25 * requests + 0.5 * now + 1e-6
        assert by_end >= min(len(made_at), 5)


def test_a_debt_is_waited_off_and_a_reserve_does_not_grow_without_bound():
    now = 0.0
    budget = RetryBudget(share=0.2, reserve=2, per_second=0.5, clock=lambda: now)
    assert [budget.take_retry() for _ in range(4)] == [0.0, 0.0, 2.0, 4.0]
    now = 1000.0
    for _ in range(1000):
        budget.note_request()
    assert [budget.take_retry() for _ in range(3)] == [0.0, 0.0, 2.0]
