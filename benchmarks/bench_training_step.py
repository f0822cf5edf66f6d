"""Claim: with the fused loss, a training step of a small model on the CPU costs little more than the model's body."""

from __future__ import annotations

from benchmarks import training_step
from benchmarks.cases import Case
from benchmarks.conftest import Contest

SCRIPT, SUITE = "training_step", "benchmarks.training_step"


def test_training_step(training_case: Case, contest: Contest) -> None:
    contest(training_case, training_step.draw(training_case), training_step.CONTESTANTS, lambda able: ({}, {}))
