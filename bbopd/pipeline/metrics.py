"""Figures of a run, as they come: JSONL for programs, TensorBoard and other trackers for people."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, Protocol

from bbopd.errors import CheckpointError
from bbopd.pipeline.energy import Counter, EnergyMeter, energy_counters
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.trackers import TensorBoard, Tracker


class Recorder(Protocol):
    """Who hears the figures of a run: `RunMetrics`, which says what each is, or a list in memory."""

    def step(self, line: Mapping[str, Any]) -> None: ...
    def evaluation(self, line: Mapping[str, Any]) -> None: ...
    def trace(self, content: Mapping[str, Any]) -> None: ...
    def roll_back(self, step: int) -> None: ...
    def has_evaluation(self, stage: str, step: int) -> bool: ...


class RunMetrics:
    """Writes metrics.jsonl, evals.jsonl, trace.json and TensorBoard events, and tells ``trackers``, by name, which it closes in the end.

    Opening it at a step drops what came after that step. A tracker that fails is left out from then on, and ``note`` hears of it: the JSONL
    files say what happened. ``energy`` is what the machine has drawn since the run began, as far as its steps' lines know;
    ``counters`` None: those of this machine.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        from_step: int,
        trackers: Sequence[tuple[str, Tracker]] = (),
        note: Callable[[str], None] = lambda text: None,
        counters: Sequence[Counter] | None = None,
    ) -> None:
        self._folder = folder
        self._trackers: dict[str, Tracker] = dict(trackers)
        self._note = note
        self._open(from_step)
        before = [line["energy_joules"] for line in folder.read_lines("metrics.jsonl") if "energy_joules" in line]
        self.energy = EnergyMeter(energy_counters() if counters is None else counters, joules=before[-1] if before else 0.0)

    def _open(self, step: int) -> None:
        folder = self._folder
        folder.rewind("metrics.jsonl", step)
        folder.rewind("evals.jsonl", step)
        self._evaluated = {_name(line["stage"], line["step"]) for line in folder.read_lines("evals.jsonl")}
        self._steps = folder.append_to("metrics.jsonl")
        self._evals = folder.append_to("evals.jsonl")
        with suppress(OSError):
            self._trackers["tensorboard"] = TensorBoard(folder.tensorboard, from_step=step)

    def step(self, line: Mapping[str, Any]) -> None:
        joules = self.energy.joules()
        if joules is not None:
            line = {**line, "energy_joules": round(joules, 3)}
        self._steps.write(line)
        self._draw("train", line)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._evals.write(line)
        self._evaluated.add(_name(line["stage"], line["step"]))
        self._draw("eval", line)

    def trace(self, content: Mapping[str, Any]) -> None:
        with suppress(CheckpointError):  # it tells of the run, and must not end it
            self._folder.write_json("trace.json", content, indent=None)

    def roll_back(self, step: int) -> None:
        """The updates after ``step`` are undone, and others will be made: their lines go to rolled_back.jsonl."""
        self._steps.close()
        self._evals.close()
        undone = self._folder.append_to("rolled_back.jsonl")
        for line in self._folder.read_lines("metrics.jsonl"):
            if line["step"] > step:
                undone.write(line)
        undone.close()
        if (board := self._trackers.pop("tensorboard", None)) is not None:
            with suppress(OSError):
                board.close()
        self._open(step)

    def has_evaluation(self, stage: str, step: int) -> bool:
        """Whether ``stage`` has been evaluated; "step" evaluations come again at every step they are due."""
        return _name(stage, step) in self._evaluated

    def close(self) -> None:
        self._steps.close()
        self._evals.close()
        for name, tracker in list(self._trackers.items()):
            self._tell(name, tracker.close)

    def _draw(self, group: str, line: Mapping[str, Any]) -> None:
        figures = {f"{group}/{name}": float(value) for name, value in line.items() if name != "step" and _is_figure(value)}
        for name, tracker in list(self._trackers.items()):
            self._tell(name, tracker.log, figures, line["step"])

    def _tell(self, name: str, call: Callable[..., None], *arguments: Any) -> None:
        try:
            call(*arguments)
        except Exception as error:  # whatever its library raises: a full disk or a server that is gone ends the drawing, not the run
            del self._trackers[name]
            self._note(f"{name} hears no more of this run ({type(error).__name__}: {error})")


def _is_figure(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _name(stage: str, step: int) -> tuple[str, int]:
    return (stage, step if stage == "step" else 0)
