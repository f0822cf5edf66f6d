"""Claim: scoring (top-64, tail and sampled token) on the CPU costs little more than the one matrix product under it."""

from __future__ import annotations

from benchmarks import accuracy, logprobs
from benchmarks.cases import Case
from benchmarks.conftest import Contest

SCRIPT, SUITE = "logprobs", "benchmarks.logprobs"


def test_logprobs(logprobs_case: Case, contest: Contest) -> None:
    small = accuracy.error_case(logprobs_case)
    contest(logprobs_case, logprobs.draw(logprobs_case), logprobs.CONTESTANTS, lambda able: (accuracy.logprobs_errors(able, small), {}))
