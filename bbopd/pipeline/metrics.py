"""Figures of a run, as they come: JSONL for programs, TensorBoard for people."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from bbopd.errors import CheckpointError
from bbopd.pipeline.folder import RunFolder


class RunMetrics:
    """Writes metrics.jsonl, evals.jsonl, trace.json and TensorBoard events. Opening it at a step drops what came after that step."""

    def __init__(self, folder: RunFolder, *, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._folder = folder
        folder.rewind("metrics.jsonl", from_step)
        folder.rewind("evals.jsonl", from_step)
        self._evaluated = {_name(line["stage"], line["step"]) for line in folder.read_lines("evals.jsonl")}
        self._steps = folder.append_to("metrics.jsonl")
        self._evals = folder.append_to("evals.jsonl")
        self._board: SummaryWriter | None = None
        with suppress(OSError):
            self._board = SummaryWriter(str(folder.tensorboard), purge_step=from_step + 1)

    def step(self, line: Mapping[str, Any]) -> None:
        self._steps.write(line)
        self._draw("train", line)

    def evaluation(self, line: Mapping[str, Any]) -> None:
        self._evals.write(line)
        self._evaluated.add(_name(line["stage"], line["step"]))
        self._draw("eval", line)

    def trace(self, content: Mapping[str, Any]) -> None:
        with suppress(CheckpointError):  # it tells of the run, and must not end it
            self._folder.write_json("trace.json", content, indent=None)

    def has_evaluation(self, stage: str, step: int) -> bool:
        """Whether ``stage`` has been evaluated; "step" evaluations come again at every step they are due."""
        return _name(stage, step) in self._evaluated

    def close(self) -> None:
        self._steps.close()
        self._evals.close()
        if self._board is not None:
            with suppress(OSError):
                self._board.close()

    def _draw(self, group: str, line: Mapping[str, Any]) -> None:
        if self._board is None:
            return
        try:
            for name, value in line.items():
                if isinstance(value, int | float) and name != "step":
                    self._board.add_scalar(f"{group}/{name}", value, line["step"])
            self._board.flush()
        except OSError:
            self._board = None  # a full disk ends the drawing, not the run: the JSONL files say what happened


def _name(stage: str, step: int) -> tuple[str, int]:
    return (stage, step if stage == "step" else 0)
