"""What a comparison still has to do, and how long that takes by what its own runs have taken so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from bbopd.compare.plan import Entrant, PlannedRun
from bbopd.compare.results import Result
from bbopd.compare.run import Comparison


@dataclass(frozen=True, slots=True)
class Work:
    """Of one entrant: ``runs`` to train and ``measurements`` to take, of all there are; ``seconds`` are None where nothing is known yet."""

    entrant: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    planned: int
    runs: int
    measurements: int
    seconds: float | None


def work_left(comparison: Comparison) -> list[Work]:
    """For every entrant. An arm without a finished run is taken to need as long as the others' runs that train (the slowest of them)."""
    known = {entrant.name: _results(comparison, entrant) for entrant in comparison.entrants}
    measuring = [found["seconds"] for results in known.values() for result in results for found in result.measured.values()]
    slowest = max((median(times) for results in known.values() if (times := _times(results))), default=None)
    return [_work(comparison, entrant, _times(known[entrant.name]), slowest, measuring) for entrant in comparison.entrants]


def _work(comparison: Comparison, entrant: Entrant, times: Sequence[float], slowest: float | None, measuring: Sequence[float]) -> Work:
    trials = entrant.trials()
    rate = comparison.chosen_rate(entrant) or entrant.learning_rates[0]  # whichever it will be: one rate for the other seeds
    finals = entrant.finals(rate)
    wanted: list[tuple[PlannedRun, str]] = [*((run, "development") for run in trials), *((run, "test") for run in finals)]
    missing = [(run, split) for run, split in wanted if not comparison.is_done(run, split)]
    untrained = {run.name for run, _ in missing if comparison.results.of_run(run) is None}
    seconds_a_run = median(times) if times else slowest
    seconds = None
    if not missing:
        seconds = 0.0
    elif seconds_a_run is not None and measuring:
        seconds = len(untrained) * seconds_a_run + len(missing) * median(measuring)
    return Work(
        entrant.name,
        entrant.learning_rates,
        entrant.seeds,
        len({run.name for run, _ in wanted}),
        len(untrained),
        len(missing),
        seconds,
    )


def _results(comparison: Comparison, entrant: Entrant) -> list[Result]:
    return [result for run in entrant.runs.values() if (result := comparison.results.of_run(run)) is not None]


def _times(results: Sequence[Result]) -> list[float]:
    return [result.spent.all_seconds for result in results if result.spent is not None]
