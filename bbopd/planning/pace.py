"""Seconds of an update cycle by stage, from tokens and rates, and which stage the others wait for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bbopd.config import RunConfig
from bbopd.planning.rates import Rates
from bbopd.planning.tokens import Cycle

__all__ = ["Pace", "pace_of"]


@dataclass(frozen=True, slots=True)
class Pace:
    """``seconds`` of one cycle by stage, those with a rate; ``unknown`` stages have work and none. What is added up leaves these out."""

    seconds: Mapping[str, float]
    unknown: tuple[str, ...]
    overlaps: bool
    cycle: float
    update: float

    @property
    def bottleneck(self) -> str | None:
        """The slowest stage: of overlapping cycles the one that sets the pace."""
        return max(self.seconds, key=self.seconds.__getitem__) if self.seconds else None


def pace_of(config: RunConfig, cycle: Cycle, rates: Rates) -> Pace:
    """Cycles in turn take as long as their stages together, overlapping ones as long as the slowest; a push counts to the sampling."""
    work = {
        "sampling": (cycle.written, rates.sampling),
        "scoring": (cycle.scored, rates.scoring),
        "training": (cycle.trained, rates.training),
    }
    seconds = {stage: tokens / rate for stage, (tokens, rate) in work.items() if tokens and rate is not None}
    unknown = tuple(stage for stage, (tokens, rate) in work.items() if tokens and rate is None)
    if "sampling" in seconds:
        seconds["sampling"] += rates.push
    overlaps = config.writes_rollouts and config.rollouts.engine != "hf" and config.rollouts.max_staleness > 0
    whole = rates.other + (max(seconds.values(), default=0.0) if overlaps else sum(seconds.values()))
    return Pace(seconds, unknown, overlaps, whole, whole / cycle.steps)
