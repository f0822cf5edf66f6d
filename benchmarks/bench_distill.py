"""Claim: a fused distillation step on the CPU costs about its three matrix products, in a few megabytes, and is exact at small KL."""

from __future__ import annotations

from benchmarks import accuracy, distill
from benchmarks.cases import Case
from benchmarks.conftest import Contest
from benchmarks.contest import Contestant

SCRIPT, SUITE = "distill", "benchmarks.distill"


def test_distill(distill_case: Case, contest: Contest) -> None:
    case = distill_case

    def errors_of(able: list[Contestant]) -> tuple[dict[str, float], dict[str, float]]:
        near = accuracy.gradient_errors(able, accuracy.near_case(case)) if case.teacher != "none" else {}
        return accuracy.gradient_errors(able, accuracy.error_case(case)), near

    contest(case, distill.draw(case), distill.contestants_of(case), errors_of)


def test_sweep(sweep_case: Case, contest: Contest) -> None:
    contest(sweep_case, distill.draw(sweep_case), distill.contestants_of(sweep_case), lambda able: ({}, {}))
