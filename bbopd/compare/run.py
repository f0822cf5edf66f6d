"""The comparison itself: arm by arm, run by run, each done once; what was interrupted goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from bbopd.compare import processes
from bbopd.compare.measure import MeasureRequest
from bbopd.compare.plan import Entrant, PlannedRun, make_plan
from bbopd.compare.results import Result, ResultFolder, reference_name
from bbopd.compare.shared_teachers import SharedTeachers
from bbopd.compare.table import markdown
from bbopd.compare.verdict import Pair, Row, make_pairs, make_row, to_json
from bbopd.config_compare import CompareConfig, is_share
from bbopd.errors import ConfigError
from bbopd.pipeline.folder import RunFolder

Say = Callable[[str], None]
Distill = Callable[[PlannedRun], None]
Measure = Callable[[MeasureRequest, Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """The table so far, and what could not be done."""

    rows: Sequence[Row]
    pairs: Sequence[Pair]
    failures: Sequence[str] = field(default_factory=tuple)


class Comparison:
    """``compare`` with its plan. `run` does what is missing; `outcome` tells what is there.

    ``distill`` trains one run into its folder, ``measure`` takes a request and the file of its log; both are processes by default. Raises
    `ConfigError` where a run could not run, or was run with another configuration.
    """

    def __init__(self, compare: CompareConfig, *, distill: Distill = processes.distill, measure: Measure = processes.measure) -> None:
        self.config = compare
        self._distill, self._measure = distill, measure
        self.entrants = make_plan(compare)
        self.results = ResultFolder(Path(compare.output))
        for entrant in self.entrants:
            for run in entrant.runs.values():
                self.results.of_run(run)
        for split in ("test", "development"):
            if self._questions(split) is not None:
                self._request("", split).settings()  # the file can be read

    def run(self, say: Say) -> Outcome:
        """Train and measure what is missing. A process that fails costs its own run alone. Raises `KeyboardInterrupt`, with all kept."""
        failures: list[str] = []
        with SharedTeachers(Path(self.config.output)) as teachers:
            for entrant in self.entrants:
                self._run_entrant(entrant, teachers, say, failures)
                self.write(self.outcome(failures))
        for name, model in self.config.references.items():
            self._attempt(partial(self._measure_reference, name, model, say), say, failures)
        outcome = self.outcome(failures)
        self.write(outcome)
        return outcome

    def _run_entrant(self, entrant: Entrant, teachers: SharedTeachers, say: Say, failures: list[str]) -> None:
        for run in entrant.trials():
            self._attempt(partial(self._complete, run, "development", teachers, say), say, failures)
        rate = self.chosen_rate(entrant)
        if rate is None:
            return
        if len(entrant.learning_rates) > 1:
            say(f"{entrant.name}: learning rate {rate:g} is the best of {len(entrant.learning_rates)} on the development questions")
        for run in entrant.finals(rate):
            self._attempt(partial(self._complete, run, "test", teachers, say), say, failures)
        if not self.config.keep_models:
            for run in entrant.runs.values():
                if self._is_measured(self.results.read(run.name), "test") or run not in entrant.finals(rate):
                    shutil.rmtree(Path(run.config.output) / "model", ignore_errors=True)

    def _attempt(self, work: Callable[[], None], say: Say, failures: list[str]) -> None:
        try:
            work()
        except processes.FailedError as error:
            failures.append(str(error))
            say(str(error))

    def _complete(self, run: PlannedRun, split: str, teachers: SharedTeachers, say: Say) -> None:
        """Train ``run`` where it is not trained, and measure it on ``split`` where it is not measured."""
        result = self.results.of_run(run)
        if self._is_measured(result, split):
            return
        folder = RunFolder(Path(run.config.output))
        model = folder.root / "model"
        if result is not None and not model.exists():
            shutil.rmtree(folder.root, ignore_errors=True)  # its model was removed after other questions: it is made again
        if result is None or not model.exists():
            say(f"{run.name}: training")
            self._distill(teachers.lend(run))
            result = self.results.of_run(run)
            assert result is not None, "the process has ended well"
            self.results.write(result)
        shutil.rmtree(folder.checkpoints, ignore_errors=True)
        say(f"{run.name}: measuring on {split} questions")
        result.measured[split] = self._take(str(model), split, run.name)
        self.results.write(result)
        say(f"{run.name}: {self.config.measures.decide_by} {result.value(split, self.config.measures.decide_by):.4g} on {split}")

    def _measure_reference(self, name: str, model: str, say: Say) -> None:
        file = reference_name(name)
        result = self.results.read(file) or Result(file, name)
        if self._is_measured(result, "test"):
            return
        say(f"{name}: measuring {model}")
        result.measured["test"] = self._take(model, "test", file)
        self.results.write(result)

    def _take(self, model: str, split: str, name: str) -> dict[str, Any]:
        found = self._measure(self._request(model, split), self.results.root / f"{name}.log")
        if self.config.measures.decide_by not in found["measures"]:
            known = ", ".join(sorted(found["measures"])) or "none"
            raise ConfigError(
                f"measures.decide_by is {self.config.measures.decide_by}, which {self._questions(split)} does not tell for each question: "
                f"take one of its measures ({known})"
            )
        return found

    # ------------------------------------------------------------ what is there

    def outcome(self, failures: Sequence[str] = ()) -> Outcome:
        """The table of what has been measured so far."""
        confidence = self.config.measures.confidence
        rows, tested = [], {}
        for entrant in self.entrants:
            rate = self.chosen_rate(entrant)
            runs = [] if rate is None else entrant.finals(rate)
            done = [result for run in runs if (result := self.results.of_run(run)) is not None and self._is_measured(result, "test")]
            if done:
                tested[entrant.name] = done
                rows.append(make_row(entrant.name, done, is_reference=False, confidence=confidence, tried=self._tried(entrant)))
        for name in self.config.references:
            found = self.results.read(reference_name(name))
            if found is not None and self._is_measured(found, "test"):
                tested[name] = [found]
                rows.append(make_row(name, [found], is_reference=True, confidence=confidence))
        pairs = make_pairs(
            tested,
            self.config.measures.decide_by,
            higher_is_better=is_share(self.config.measures.decide_by),
            confidence=confidence,
            pairs=self.config.pairs,
        )
        return Outcome(rows, pairs, tuple(failures))

    def chosen_rate(self, entrant: Entrant) -> float | None:
        """The only learning rate, or the best of those tried, of equal ones the lowest; None where none has been tried yet."""
        if len(entrant.learning_rates) == 1:
            return entrant.learning_rates[0]
        sign = -1.0 if is_share(self.config.measures.decide_by) else 1.0
        tried = self._tried(entrant)
        return min(tried, key=lambda rate: (sign * tried[rate], rate), default=None)

    def is_done(self, run: PlannedRun, split: str) -> bool:
        return self._is_measured(self.results.of_run(run), split)

    def to_json(self, outcome: Outcome) -> dict[str, Any]:
        """The table with its configuration, and what is missing."""
        measures = self.config.measures
        table = to_json(outcome.rows, outcome.pairs, measures.decide_by, measures.confidence)
        return {**table, "config": self.config.model_dump(mode="json"), "failures": list(outcome.failures)}

    def write(self, outcome: Outcome) -> None:
        """``compare.json`` and ``compare.md`` in the output folder."""
        measures = self.config.measures
        root = Path(self.config.output)
        root.mkdir(parents=True, exist_ok=True)
        RunFolder(root).write_json("compare.json", self.to_json(outcome))
        text = markdown(outcome.rows, outcome.pairs, measures.decide_by, measures.confidence)
        (root / "compare.md").write_text(text, encoding="utf-8")

    def _tried(self, entrant: Entrant) -> dict[float, float]:
        found = {run.learning_rate: self.results.of_run(run) for run in entrant.trials()}
        return {
            rate: result.value("development", self.config.measures.decide_by)
            for rate, result in found.items()
            if result is not None and self._is_measured(result, "development")
        }

    def _is_measured(self, result: Result | None, split: str) -> bool:
        if result is None or split not in result.measured:
            return False
        known: Mapping[str, Any] = result.measured[split]["settings"]
        return known == self._request("", split).settings()

    def _questions(self, split: str) -> str | None:
        return self.config.measures.test if split == "test" else self.config.measures.development

    def _request(self, model: str, split: str) -> MeasureRequest:
        """How any model is measured, a reference like a student."""
        measures, questions = self.config.measures, self._questions(split)
        student = next(iter(self.entrants[0].runs.values())).config.student
        assert questions is not None, "a learning rate is chosen on development questions alone"
        return MeasureRequest(
            model=model,
            questions=questions,
            limit=measures.test_limit if split == "test" else measures.development_limit,
            is_task=measures.is_task,
            exact_match=measures.decide_by == "exact_match",
            pattern=measures.pattern,
            max_new_tokens=measures.max_new_tokens,
            device=student.device,
            dtype=student.dtype,
            also=measures.also if split == "test" else (),
        )
