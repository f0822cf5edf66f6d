"""Options of the benchmark scripts, and the records that each case publishes at its end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from benchmarks import cases, machine, report
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Entry, Resettable, enter, peak_megabytes, run_round
from benchmarks.records import Record, make_record

ROUNDS, QUICK_ROUNDS = 9, 5
Errors = Callable[[list[Contestant]], tuple[dict[str, float], dict[str, float]]]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bbopd benchmarks")
    group.addoption("--quick", action="store_true", help="the smaller sizes, fewer rounds")
    group.addoption("--rounds", type=int, help=f"interleaved rounds of each case (default {ROUNDS}, or {QUICK_ROUNDS} with --quick)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "default")  # peers may warn; a long case is no hanging test
    config.option.timeout = 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, make in (
        ("distill_case", cases.distill_cases),
        ("sweep_case", cases.sweep_cases),
        ("logprobs_case", cases.logprobs_cases),
        ("training_case", lambda is_quick: cases.training_cases()),
    ):
        if argument in metafunc.fixturenames:
            metafunc.parametrize(argument, make(metafunc.config.getoption("quick")), ids=lambda case: case.name)


Contest = Callable[[Case, Resettable, tuple[Contestant, ...], Errors], None]


@pytest.fixture
def contest(request: pytest.FixtureRequest) -> Contest:
    """Run one case and publish it: interleaved rounds by pytest-benchmark, then errors, then memory, each in a fresh process."""
    benchmark = request.getfixturevalue("benchmark")

    def run(case: Case, inputs: Resettable, contestants: tuple[Contestant, ...], errors_of: Errors) -> None:
        entries = enter(contestants, inputs, case)
        numbers = iter(range(10**9))
        rounds = request.config.getoption("rounds") or (QUICK_ROUNDS if request.config.getoption("quick") else ROUNDS)
        benchmark.pedantic(lambda: run_round(entries, inputs, next(numbers)), rounds=rounds, iterations=1)
        able = [entry.contestant for entry in entries if not entry.skipped]
        errors, near_errors = errors_of(able)
        memory = {one.name: peak_megabytes(request.module.SUITE, case, one.name) for one in able}
        report.publish(request.module.SCRIPT, _records_of(case, entries, memory, errors, near_errors))
        benchmark.extra_info["median_ms"] = {entry.contestant.name: 1e3 * entry.median for entry in entries if entry.median is not None}
        benchmark.extra_info["memory_mib"] = memory
        benchmark.extra_info["skipped"] = {entry.contestant.name: entry.skipped for entry in entries if entry.skipped}

    return run


def _records_of(
    case: Case, entries: list[Entry], memory: dict[str, float | None], errors: dict[str, float], near_errors: dict[str, float]
) -> list[Record]:
    where, floor_seconds = machine.describe(), entries[0].median
    names = [entry.contestant.name for entry in entries]
    return [
        make_record(case, entry, floor_seconds, memory.get(name), errors.get(name), near_errors.get(name), where)
        for name, entry in zip(names, entries, strict=True)
    ]
