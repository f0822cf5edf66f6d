"""What changes over a run: the learning rate, and how much each term of the loss weighs. Pure functions of the step.

Steps count from 0. ``planned_steps`` is what the budgets allow, an estimate where lengths vary; a run that goes on past it keeps
the values of its last planned step.
"""

from __future__ import annotations

import math

from bbopd.config import ObjectiveConfig, TrainConfig, resolve_steps


def learning_rate_at(step: int, planned_steps: int, train: TrainConfig) -> float:
    """Learning rate of update ``step``.

    It rises linearly over the first ``warmup`` steps, ``lr * (step + 1) / warmup``, so that no update is wasted at 0; then it stays,
    or falls to 0 (reached just after the last planned step) along a line or half a cosine (Loshchilov & Hutter 2017, eq. 5, one cycle).
    """
    warmup = resolve_steps(train.warmup, planned_steps)
    if step < warmup:
        return train.lr * (step + 1) / warmup
    if train.schedule == "constant":
        return train.lr
    progress = (min(step, planned_steps - 1) - warmup) / max(1, planned_steps - warmup)
    progress = max(0.0, progress)
    return train.lr * (1.0 - progress if train.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress)))


def loss_weights_at(step: int, planned_steps: int, objective: ObjectiveConfig) -> tuple[float, float]:
    """The pair ``(ce_weight, kd_weight)`` of update ``step``; the targets are reached at step ``ramp`` and kept.

    ``ramp_kind`` kd_weight: kd_weight rises from 0 while ce_weight keeps its own. alpha, the literal reading of
    ``alpha * CE + (1 - alpha) * KD``: alpha rises from 0, so the run starts as pure distillation.
    """
    ce_weight, kd_weight = objective.weights
    ramp = resolve_steps(objective.ramp, planned_steps)
    if objective.is_cross_entropy or step >= ramp:
        return ce_weight, kd_weight
    risen = step / ramp
    if objective.ramp_kind == "alpha":
        return ce_weight * risen, 1.0 - ce_weight * risen
    return ce_weight, kd_weight * risen
