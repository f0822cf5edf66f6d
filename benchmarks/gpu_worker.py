"""Run by `benchmarks.gpu` as a process of its own: measures one case after another, and says on stdout what it is about to try."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import accuracy, clock, machine, report
from benchmarks.cases import Case
from benchmarks.contest import Contestant, DeviceLostError, Entry, enter, failing_alone, run_round
from benchmarks.gpu_contestants import distill_contestants, logprobs_contestants
from benchmarks.gpu_measures import peak_mebibytes, row_gigabytes_per_second
from benchmarks.inputs import Inputs, draw
from benchmarks.records import make_record

MARK = "@"  # begins a line that is for `benchmarks.gpu`
FEWEST_ROUNDS, CASE_SECONDS = 3, 2.0  # the rounds of a case take about so long, but are three at least


def tell(**said: Any) -> None:
    print(MARK + json.dumps(said), flush=True)


def measure(script: str, case: Case, compiles: bool, left_out: dict[str, str], rounds: int) -> tuple[list[Entry], list[dict[str, Any]]]:
    """The contest of one case; of every contestant its entry, and what else was measured."""
    is_distill = script == "gpu_distill"
    contestants = (distill_contestants if is_distill else logprobs_contestants)(case, compiles)
    able = [one for one in contestants if one.name not in left_out]
    try:
        inputs = draw(case)
    except torch.OutOfMemoryError:
        clock.recover(case.device)
        return [Entry(one, skipped="out of memory for the inputs alone") for one in contestants], [{}] * len(contestants)
    entries = enter(able, inputs, case, any_may_fail=True, entering=lambda name: tell(trying=name))
    _run_rounds(entries, inputs, rounds)
    measures: dict[str, dict[str, Any]] = {one.name: {} for one in contestants}
    for entry in entries:
        if entry.step is not None:
            tell(trying=entry.contestant.name)
            with failing_alone(entry, inputs):
                measures[entry.contestant.name] |= _beside_time(entry, inputs, case)
    running = [entry.contestant for entry in entries if entry.step is not None]
    entries += [Entry(one, skipped=left_out[one.name]) for one in contestants if one.name in left_out]
    del inputs
    for entry in entries:
        entry.step = None  # holds inputs and buffers
    for column, errors in _errors(is_distill, running, case).items():
        for name, error in errors.items():
            measures[name][column] = error
    return entries, [measures[entry.contestant.name] for entry in entries]


def _run_rounds(entries: list[Entry], inputs: Inputs, most: int) -> None:
    start = time.monotonic()
    for number in range(most):
        run_round(entries, inputs, number)
        if number + 1 >= FEWEST_ROUNDS and time.monotonic() - start > CASE_SECONDS:
            return


def _beside_time(entry: Entry, inputs: Inputs, case: Case) -> dict[str, Any]:
    assert entry.step is not None
    found: dict[str, Any] = {"memory_mib": peak_mebibytes(entry.step, inputs)}
    if entry.contestant.name.startswith("bbopd") and inputs.hidden.requires_grad and case.objective != "logprobs":
        try:
            found["row_gigabytes_per_second"] = row_gigabytes_per_second(entry.step, inputs, case)
        except RuntimeError as error:
            print(f"{case.name}: no GB/s for {entry.contestant.name}: {error}")
    return found


def _errors(is_distill: bool, contestants: list[Contestant], case: Case) -> dict[str, dict[str, float]]:
    """By column and name, one contestant at a time, so that what one of them cannot do the others still can."""
    found: dict[str, dict[str, float]] = {"error": {}, "near_error": {}}
    small = accuracy.error_case(case)
    for one in contestants:
        if is_distill:
            _try(one, case, lambda one=one: found["error"].update(accuracy.gradient_errors([one], small)))  # type: ignore[misc]
            if case.teacher in ("topk", "full", "full_hidden"):
                near = accuracy.near_case(case)
                _try(one, case, lambda one=one, near=near: found["near_error"].update(accuracy.gradient_errors([one], near)))  # type: ignore[misc]
        else:
            _try(one, case, lambda one=one: found["error"].update(accuracy.logprobs_errors([one], small)))  # type: ignore[misc]
    return found


def _try(contestant: Contestant, case: Case, measure_error: Callable[[], None]) -> None:
    tell(trying=contestant.name)
    try:
        measure_error()
    except Exception as error:  # as in the contest itself
        line = f"{case.name}: no error against float64 for {contestant.name}: {type(error).__name__}: {error}"
        print(line)
        if contestant.name.startswith("bbopd") and not isinstance(error, torch.OutOfMemoryError):
            tell(failures=[line])
    clock.recover(case.device)


def run(job: dict[str, Any], results: Path, rounds: int, arguments: list[str]) -> None:
    case = Case(**job["case"])
    entries, measures = measure(job["script"], case, job["compiles"], job["left_out"], rounds)
    where = machine.describe(case.device, "benchmarks.gpu", arguments)
    floor = entries[0].median if entries[0].contestant.name.startswith("floor") else None
    columns = {"memory_mib": None, "error": None, "near_error": None, "row_gigabytes_per_second": None}
    records = [make_record(case, entry, floor, machine=where, **columns | more) for entry, more in zip(entries, measures, strict=True)]
    report.publish(job["script"], records, results)
    failed = [entry for entry in entries if entry.contestant.name.startswith("bbopd") and entry.has_failed]
    tell(failures=[f"{case.name}: {entry.contestant.name}: {entry.skipped}" for entry in failed])
    times = ", ".join(f"{entry.contestant.name} {1e3 * entry.median:,.2f} ms" for entry in entries if entry.median is not None)
    tell(finished=f"{case.name}: {times or 'nobody could run it'}")


def main() -> None:
    request = json.load(sys.stdin)
    ends = None if request["seconds"] is None else time.monotonic() + request["seconds"]
    for job in request["jobs"]:
        if ends is not None and time.monotonic() > ends:
            return
        try:
            run(job, Path(request["results"]), request["rounds"], request["arguments"])
        except DeviceLostError as lost:
            tell(trying=lost.args[0])
            raise


if __name__ == "__main__":
    main()
