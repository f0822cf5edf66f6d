"""An objective as of another package, whose loss is NaN in one update, and only once: forward KL otherwise."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from bbopd import DistillLoss
from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives import Facts, make_objective
from bbopd.types import Level, SignalSpec


class Spoilt:
    FACTS = Facts(needs=("full",), computes="forward KL, and NaN once", source="")

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

        update: int

    name = "spoilt"

    def __init__(self, config: ObjectiveConfig, options: Options) -> None:
        self._inner = make_objective(ObjectiveConfig(temperature=config.temperature, ramp=0))
        self._update, self._seen, self._progress = options.update, 0, -1.0
        self._is_here = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)  # on the last rank alone

    @property
    def needs(self) -> tuple[Level, ...]:
        return self.FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return self._inner.signal(teacher)

    def at(self, progress: float) -> Spoilt:
        """Every update has another, whichever rank's pass it is."""
        self._seen, self._progress = self._seen + (progress != self._progress), progress
        return self

    def loss(self, *arguments: Any, **options: Any) -> DistillLoss:
        found = self._inner.loss(*arguments, **options)
        if self._is_here and self._seen == self._update:
            self._is_here = False
            return replace(found, loss=found.loss * float("nan"))
        return found


def install(folder: Path) -> None:
    """As pip would have."""
    info = folder / "spoilt-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spoilt\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[bbopd.objectives]\nspoilt = tests.spoilt_objective:Spoilt\n")
