"""Claim: a server's memory is flat over ten thousand requests of mixed length."""

from __future__ import annotations

import asyncio

from benchmarks import rates
from benchmarks.server_memory import BOUND_MIB, MARKS, WARM, measure


def test_teacher_memory() -> None:
    found = asyncio.run(measure())
    figures = {f"MiB after {mark:,}": f"{found.at[mark]:.1f}" for mark in MARKS} | {"growth": f"{found.growth:.1f}"}
    runner = rates.Runner("resident memory", f"growth from {WARM:,} requests on; allowed are {BOUND_MIB:g} MiB", figures=figures)
    task = f"{MARKS[-1]:,} requests of 1 to 64 + 1 to 512 tokens, by turns top-64, sampled, full and top-8 at T = 2"
    print(rates.publish("teacher_memory", task, [runner], "one server process").read_text())
    assert found.growth < BOUND_MIB
