"""Claim: overlapping cycles take as long as their slowest stage, cycles in turn as long as all stages together.

The loop is the real one; engine, teacher and trainer only take time, on a clock that jumps (`tests/simulated.py`): the figures are of the
loop alone, and the same on every machine. 256 rollouts at a time, 1,000 updates, 8 to a cycle; a teacher that takes 50 ms to 5 s an answer
(Pareto, exponent 1). A stage alone is the same run, in turn, with the others taking no time; "over the slowest" compares with the slowest
of them alone, overlapping.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.simulated import Durations, Simulation, heavy_tail, simulate, simulated_config

ROLLOUTS, CYCLES, ALONE_CYCLES = 256, 125, 20
RESULTS = Path(__file__).parent / "results" / "pipeline.md"
STAGES: dict[str, dict[str, Any]] = {
    "sampling": {"token": 0.0},
    "scoring": {"teacher": lambda random: 0.0},
    "training": {"trained_token": 0.0, "step": 0.0},
}
BASE = Durations(token=0.6, slots=ROLLOUTS, trained_token=0.0046, teacher=heavy_tail, push=0.5)


@dataclass(frozen=True)
class Scenario:
    name: str
    durations: Durations
    steps_per_cycle: int = 8
    bound: float = 1.10  # of the slowest stage


SCENARIOS = [
    Scenario("all but equal", BASE),
    Scenario("sampling slowest", replace(BASE, trained_token=0.003)),
    Scenario("training slowest", replace(BASE, token=0.4)),
    Scenario("teacher slowest (4 answers at a time)", replace(BASE, teacher_places=4, token=0.4, trained_token=0.003)),
    Scenario("all but equal, 2 updates a cycle", BASE, steps_per_cycle=2, bound=1.25),
]


def run(scenario: Scenario, staleness: int, cycles: int, durations: Durations | None = None) -> Simulation:
    config = simulated_config(
        per_update=ROLLOUTS,
        batch_tokens=round(ROLLOUTS * 16.5 / scenario.steps_per_cycle),
        steps=cycles * scenario.steps_per_cycle,
        staleness=staleness,
    )
    return simulate(config, durations or scenario.durations)


def seconds_per_update(simulation: Simulation) -> float:
    return simulation.seconds / simulation.state.step


@pytest.fixture(scope="module")
def rows() -> Iterator[list[str]]:
    found: list[str] = []
    yield found
    titles = ("seconds an update", *STAGES, "sum", "in turn (0)", "over the sum", "overlapping (1)", "over the slowest", "simulated in")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|", *found]
    RESULTS.write_text(f"`pytest benchmarks/bench_pipeline.py`\n\n{__doc__}\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_pipeline(scenario: Scenario, rows: list[str]) -> None:
    alone: dict[str, Durations] = {}
    for stage in STAGES:
        others = {name: value for other, values in STAGES.items() if other != stage for name, value in values.items()}
        alone[stage] = replace(scenario.durations, **others, push=scenario.durations.push if stage == "sampling" else 0.0)
    by_stage = {stage: seconds_per_update(run(scenario, 0, ALONE_CYCLES, durations)) for stage, durations in alone.items()}
    slowest = seconds_per_update(run(scenario, 1, ALONE_CYCLES, alone[max(by_stage, key=by_stage.__getitem__)]))
    started = time.perf_counter()
    in_turn, overlapping = seconds_per_update(run(scenario, 0, CYCLES)), run(scenario, 1, CYCLES)
    took = time.perf_counter() - started
    overlapped, total = seconds_per_update(overlapping), sum(by_stage.values())
    figures = [*(f"{seconds:.2f}" for seconds in (*by_stage.values(), total, in_turn)), f"{in_turn / total:.3f}"]
    figures += [f"{overlapped:.2f}", f"{overlapped / slowest:.3f}", f"{took:.0f} s"]
    rows.append(f"| {scenario.name} | {' | '.join(figures)} |")
    assert max(line["staleness_max"] for line in overlapping.lines.steps) <= 1
    assert in_turn == pytest.approx(total, rel=0.03)
    assert overlapped <= scenario.bound * slowest
