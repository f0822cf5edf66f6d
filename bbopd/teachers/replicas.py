"""Whether replicas of a teacher say the same: one input, scored by each, several times at once, and how far the answers lie apart.

Replicas that describe themselves alike may still differ: another precision, another kernel, other settings of an engine, a card
that computes wrongly. And one replica may differ from itself, by what else is in its batch. What is measured is the total
variation distance, half the sum of \\|p - q\\| over a token's possibilities: the share of probability that would have to move.

Shape suffixes: ``L`` response tokens, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from bbopd.types import TeacherSignal

__all__ = ["largest_difference", "total_variation"]


def largest_difference(answers: Sequence[TeacherSignal]) -> float:
    """The largest total variation distance, at any token, of any of the ``answers`` from the first one."""
    return max((float(total_variation(answers[0], other).max()) for other in answers[1:]), default=0.0)


def total_variation(first: TeacherSignal, other: TeacherSignal) -> np.ndarray:
    """Total variation distance at every token, float64 [L], in 0..1.

    Of whole distributions at level ``full``. At ``topk`` and ``candidates`` ids that only one of the two names count to the tail of
    both, which makes it a lower bound; at ``sampled`` it is the difference in the probability of the rollout's own token.
    """
    if first.logits is not None and other.logits is not None:
        return 0.5 * np.abs(_softmax(first.logits) - _softmax(other.logits)).sum(axis=1)
    if first.ids is None or other.ids is None:
        assert first.sampled is not None, "a checked signal"
        assert other.sampled is not None, "a checked signal"
        return np.abs(np.exp(first.sampled.astype(np.float64)) - np.exp(other.sampled.astype(np.float64)))
    p, q = _probabilities(first), _probabilities(other)
    distance = np.empty(len(p))
    for row, (first_ids, other_ids) in enumerate(zip(first.ids, other.ids, strict=True)):
        shared, here, there = np.intersect1d(first_ids, other_ids, return_indices=True)
        here, there = here[shared >= 0], there[shared >= 0]  # -1 is an empty slot
        moved = p[row, here] - q[row, there]
        distance[row] = 0.5 * (np.abs(moved).sum() + abs(moved.sum()))  # what the tails of both differ in is the rest
    return distance


def _probabilities(signal: TeacherSignal) -> np.ndarray:
    assert signal.logprobs is not None, "a checked signal"
    return np.exp(signal.logprobs.astype(np.float64))


def _softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64)
    weights = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)
