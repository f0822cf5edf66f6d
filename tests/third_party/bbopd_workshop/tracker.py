"""A tracker that writes a CSV file into the run's folder."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import BaseModel

from bbopd.pipeline.trackers import TrackedRun


class Csv:
    class Options(BaseModel):
        file: str = "figures.csv"

    def __init__(self, run: TrackedRun, options: Options) -> None:
        self._file = (run.folder / options.file).open("a", encoding="utf-8")

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._file.writelines(f"{step},{name},{value}\n" for name, value in figures.items())

    def close(self) -> None:
        self._file.close()
