"""Updates that must not be applied: what makes one bad, and what the run then does (`train.on_nonfinite`, `train.on_spike`).

A spike is a loss or a gradient norm above ``median + threshold * max(1.4826 * MAD, 0.1 * |median|)`` of the last updates that were applied.
1.4826 times the median absolute deviation (MAD) is the standard deviation of what is normally distributed, and, unlike that, no spike
moves it (Hampel 1974). The second term is for losses that hardly vary: with a threshold of 10, nothing below twice the median is a spike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from bbopd.config import TrainConfig
from bbopd.errors import DivergedError, TrainingError
from bbopd.pipeline.state import RunState
from bbopd.trainer.step import Gradients, StepMetrics

Answer = Literal["skip", "roll_back"]
_NORMAL = 1.4826  # standard deviations of a normal distribution in its MAD
_LEAST_SPREAD = 0.1  # of the median


class RollBackError(Exception):
    """An update was bad, and the run shall go on from its last checkpoint: says why."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with one update."""

    kind: Literal["nonfinite", "loss_spike", "gradient_spike", "discriminator"]
    said: str


class BadUpdates:
    """Judges updates by what ``state`` remembers of those before, and keeps count there."""

    def __init__(self, train: TrainConfig, state: RunState) -> None:
        self._train, self._state = train, state

    def judge(self, phase: str, gradients: Gradients) -> Fault | None:
        """What is wrong with the update that ``gradients`` would make, or None."""
        update = self._state.step + 1
        for what, value in (("loss", gradients.loss), ("gradient norm", gradients.grad_norm)):
            if not math.isfinite(value):
                return Fault("nonfinite", f"the {what} of update {update} is {value}")
        self._remember_one_phase(phase)
        recent = self._state.recent
        if self._train.on_spike == "none" or len(recent) < self._train.spike_window // 2:
            return None
        losses, norms = zip(*recent, strict=True)
        if gradients.loss > (limit := spike_limit(losses, self._train.spike_threshold)):
            return Fault("loss_spike", f"the loss of update {update} is {gradients.loss:.4g}, above {limit:.4g}")
        if gradients.grad_norm > (limit := spike_limit(norms, self._train.spike_threshold)):
            return Fault("gradient_spike", f"the gradient norm of update {update} is {gradients.grad_norm:.4g}, above {limit:.4g}")
        return None

    def applied(self, metrics: StepMetrics) -> None:
        """An update was found good, and made."""
        state = self._state
        if metrics.step > state.bad_at:
            state.bad_in_a_row = 0
        if self._train.on_spike != "none":
            state.recent = [*state.recent, [metrics.loss, metrics.grad_norm]][-self._train.spike_window :]

    def answer(self, fault: Fault, tokens: int) -> Answer:
        """Count an update of ``tokens`` response tokens that was not applied, and say how to go on.

        Raises
        ------
        TrainingError
            The run shall stop: by policy, or since too many came in a row.
        DivergedError
            The same, of a discriminator, or of updates that were rolled back: nothing is to be saved.
        """
        train, state = self._train, self._state
        is_lost = fault.kind == "discriminator"  # its weights may be broken already: the last checkpoint stands
        state.bad_updates = {**state.bad_updates, fault.kind: state.bad_updates.get(fault.kind, 0) + 1}
        state.skipped_tokens += tokens
        state.bad_in_a_row += 1
        state.bad_at = max(state.bad_at, state.step)
        is_spike = fault.kind in ("loss_spike", "gradient_spike")
        key, answer = ("on_spike", train.on_spike) if is_spike else ("on_nonfinite", train.on_nonfinite)
        if answer == "skip" or answer == "roll_back":
            if state.bad_in_a_row <= train.bad_updates_in_a_row:
                return answer
            raise (DivergedError if is_lost or answer == "roll_back" else TrainingError)(
                f"{fault.said}: the {_ordinal(state.bad_in_a_row)} bad update in a row, and train.bad_updates_in_a_row allows "
                f"{train.bad_updates_in_a_row}, so the update was not applied: {_ways_out(fault)}"
            )
        raise (DivergedError if is_lost else TrainingError)(
            f"{fault.said}, so the update was not applied (train.{key}=stop): {_ways_out(fault)}; the last checkpoint holds the weights "
            f"from before, and train.{key}=skip or roll_back goes on by itself"
        )

    def _remember_one_phase(self, phase: str) -> None:
        if phase != "cold_start" and self._state.step == self._state.cold_start_steps:  # the first update after it
            self._state.recent = []


def spike_limit(values: Sequence[float], threshold: float) -> float:
    """Above it is a spike: see the formula at the top."""
    middle = median(values)
    spread = _NORMAL * median(abs(value - middle) for value in values)
    return middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))


def _ways_out(fault: Fault) -> str:
    if fault.kind == "discriminator":
        return "lower objective.gad.discriminator_lr"
    if fault.kind == "nonfinite":
        return "lower train.lr, lengthen train.warmup, or look at the teacher's answers"
    return (
        "lower train.lr, lengthen train.warmup, look at the sequences in rejected.jsonl, or, where nothing is wrong with them, raise "
        "train.spike_threshold"
    )


def _ordinal(number: int) -> str:
    return f"{number}{'th' if 10 < number % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"
