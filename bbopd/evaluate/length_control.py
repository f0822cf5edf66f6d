"""A win rate at equal length: judges favour the longer of two answers, which says nothing of its content.

After AlpacaEval 2 (Dubois et al., arXiv 2404.04475, eq. 2): a logistic regression of the verdicts on a constant and on the difference
in length, then the win rate that it predicts at a difference of 0. Their third term, how hard each request is, needs the verdicts of
many models and is left out.

Shape suffixes: ``I`` pairs.
"""

from __future__ import annotations

import numpy as np

_RIDGE = 1e-3  # on the slope, per pair: verdicts that length alone explains would send it to infinity
_STEPS = 50
_SMALL = 1e-10


def length_controlled(table_IC: np.ndarray, weight_I: np.ndarray) -> float:
    """The win rate in [0, 1] that is left when both answers are as long.

    Parameters
    ----------
    table_IC
        float64 [pairs, 2]: the verdict on the first of two answers, 0 to 1, and how many characters longer it is.
    weight_I
        float64 [pairs]: how often each counts.
    """
    win_I, length_I = table_IC.T
    total = weight_I.sum()
    mean = float(weight_I @ win_I / total)
    spread = float(np.sqrt(weight_I @ (length_I - weight_I @ length_I / total) ** 2 / total))
    if spread == 0.0 or mean in (0.0, 1.0):
        return mean
    x_IC = np.column_stack([np.ones_like(win_I), np.tanh(length_I / spread)])
    ridge = np.diag([0.0, _RIDGE * total])
    constant = np.log(mean / (1 - mean))
    slopes = np.array([constant, 0.0])
    for _ in range(_STEPS):  # Newton's method; the penalised likelihood is concave
        p_I = 1 / (1 + np.exp(-x_IC @ slopes))
        gradient = x_IC.T @ (weight_I * (win_I - p_I)) - ridge @ slopes
        curvature = (x_IC.T * (weight_I * p_I * (1 - p_I))) @ x_IC + ridge
        step = np.linalg.solve(curvature + _SMALL * np.eye(2), gradient)
        slopes = slopes + np.clip(step, -2.0, 2.0)
        if np.abs(step).max() < _SMALL:
            break
    return float(1 / (1 + np.exp(-slopes[0])))
