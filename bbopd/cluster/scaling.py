"""How many engines a run should have, by what its pipeline waits for: `wanted_engines` decides, `Scaler` measures.

The trainer that waits for answers to be written wants more engines; engines that have nothing to write, since the trainer or the teacher
holds the next answers back, are too many.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from bbopd.config import ScaleConfig

_AGREE = 2  # windows in a row that have to ask for a change


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of a run: its seconds, those in which the trainer waited for answers to be written, and those in which none were."""

    seconds: float
    starved: float
    idle: float


def wanted_engines(windows: Sequence[Window], engines: int, scale: ScaleConfig, most: int) -> int:
    """How many there should be, by the ``windows`` since there have been ``engines`` of them, the last one last.

    Engines that are busy, and yet let the trainer wait for a share w of the time, would be as fast as it if there were 1 / (1 - w) times as
    many, but no more than twice as many at once. Those that are busy for a share b of the time do as well by b / ``scale.busy`` times as
    many. Between the two nothing changes; nor does it before two windows in a row agree, and then by as little as either asks for.
    """
    if len(windows) < _AGREE:
        return engines
    asked = [_asked(window, engines, scale) for window in windows[-_AGREE:]]
    wanted = engines
    if min(asked) > engines:
        wanted = min(asked)
    elif max(asked) < engines:
        wanted = max(asked)
    return max(scale.least, min(most, wanted))


def _asked(window: Window, engines: int, scale: ScaleConfig) -> int:
    starved, busy = window.starved / window.seconds, 1.0 - window.idle / window.seconds
    if starved > scale.starved:
        return min(2 * engines, math.ceil(engines / (1.0 - min(starved, 0.5)))) if busy > scale.busy else engines
    if starved < scale.starved / 2:
        return min(engines, math.ceil(round(engines * busy / scale.busy, 6)))
    return engines


class Scaler:
    """Reads the figures of a run's updates as they come, and says how many engines are wanted.

    Updates count once as many engines write as are wanted now: what was measured while one joins or is started again says nothing.
    """

    def __init__(self, figures: Path, scale: ScaleConfig, most: int) -> None:
        self._path, self._scale, self._most = figures, scale, most
        self._file: TextIO | None = None
        self._step = 0
        self._elapsed: float | None = None
        self._engines = 0
        self._seconds = self._starved = self._idle = 0.0
        self._windows: list[Window] = []

    def wanted(self, engines: int) -> int:
        """The number wanted, where ``engines`` are now."""
        if engines != self._engines:
            self._engines = engines
            self._windows = []
            self._elapsed = None
        for line in self._new_lines():
            self._add(line)
        return wanted_engines(self._windows, engines, self._scale, self._most)

    @property
    def last(self) -> Window | None:
        """The window that came last, of as many engines as now."""
        return self._windows[-1] if self._windows else None

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def _add(self, line: dict[str, Any]) -> None:
        before, self._elapsed = self._elapsed, line["elapsed"]
        if before is None or line.get("engines") != self._engines:
            self._seconds = self._starved = self._idle = 0.0
            return
        self._seconds += line["elapsed"] - before
        self._starved += line["starved_seconds"]
        self._idle += line["sampling_wait_seconds"]
        if self._seconds >= self._scale.window:
            self._windows = [*self._windows[1 - _AGREE :], Window(self._seconds, self._starved, self._idle)]
            self._seconds = self._starved = self._idle = 0.0

    def _new_lines(self) -> list[dict[str, Any]]:
        """Of updates beyond the last one known; a run that goes back writes a new file without those that it undoes."""
        try:
            if self._file is not None and os.fstat(self._file.fileno()).st_ino != self._path.stat().st_ino:
                self._file.close()
                self._file = None
            if self._file is None:
                self._file = self._path.open(encoding="utf-8")
                self._elapsed = None
        except FileNotFoundError:
            return []
        lines = []
        while True:
            place = self._file.tell()
            text = self._file.readline()
            if not text.endswith("\n"):  # the end, or a line that is being written
                self._file.seek(place)
                break
            line = json.loads(text)
            if line["step"] > self._step:
                self._step = line["step"]
                lines.append(line)
        return lines
