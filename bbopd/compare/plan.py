"""From a comparison to its runs: every arm with every swept value, learning rate and seed, each as a whole run configuration."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bbopd.compare.arms import known_arm, matters, run_config
from bbopd.config import RunConfig
from bbopd.config_compare import ArmConfig, CompareConfig, KnownArm
from bbopd.config_file import read_yaml
from bbopd.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """One run. ``name`` is its own, also that of its folder and of its file of results."""

    name: str
    entrant: str
    learning_rate: float
    seed: int
    config: RunConfig


@dataclass(frozen=True, slots=True)
class Entrant:
    """What is compared: an arm, with one of the swept values. ``tried`` are the learning rates to choose among."""

    name: str
    learning_rates: tuple[float, ...]
    seeds: tuple[int, ...]
    runs: Mapping[tuple[float, int], PlannedRun]

    def trials(self) -> list[PlannedRun]:
        """Runs by which the learning rate is chosen; none where there is but one."""
        return [self.runs[rate, self.seeds[0]] for rate in self.learning_rates] if len(self.learning_rates) > 1 else []

    def finals(self, learning_rate: float) -> list[PlannedRun]:
        """Runs that the table is of."""
        return [self.runs[learning_rate, seed] for seed in self.seeds]


def make_plan(compare: CompareConfig) -> list[Entrant]:
    """The entrants in the order of the arms. Raises `ConfigError` for any run that could not run, by the name of its arm."""
    base = read_yaml(compare.base) if isinstance(compare.base, str) else dict(compare.base)
    entrants = list(_entrants(compare, base))
    names = [entrant.name for entrant in entrants] + list(compare.references)
    for pair in compare.pairs or ():
        for name in pair:
            if name not in names:
                raise ConfigError(f"pairs names {name!r}, which is not compared here: {', '.join(names)} are")
    return entrants


def _entrants(compare: CompareConfig, base: Mapping[str, Any]) -> Iterator[Entrant]:
    for arm_name, arm in compare.arms.items():
        known = known_arm(arm_name, arm)
        keys = [key for key in compare.sweep if matters(key, known, arm)]
        for combination in itertools.product(*(compare.sweep[key] for key in keys)):
            swept = dict(zip(keys, combination, strict=True))
            name = " ".join([arm_name, *(f"{_last(key)}={value}" for key, value in swept.items())])
            yield _entrant(name, arm, known, swept, compare, base)


def _entrant(
    name: str, arm: ArmConfig, known: KnownArm | None, swept: Mapping[str, Any], compare: CompareConfig, base: Mapping[str, Any]
) -> Entrant:
    def plan(rate: float | None, seed: int) -> PlannedRun:
        run_name = _run_name(name, rate, seed)
        values = {**arm.set, **swept, "train.seed": seed, "output": str(Path(compare.output) / "runs" / run_name)}
        if rate is not None:
            values["train.lr"] = rate
        config = run_config(base, known, values, arm.budget or compare.budget, f"arm {name}")
        return PlannedRun(run_name, name, config.train.lr, seed, config)

    rates: Sequence[float | None] = (None,) if known == "none" or "train.lr" in {**arm.set, **swept} else compare.learning_rates or (None,)
    seeds = compare.seeds
    if known == "none" and not plan(None, seeds[0]).config.train.cold_start_tokens:
        seeds = seeds[:1]  # untrained, it is the same for every seed
    runs = [plan(rate, seed) for rate in rates for seed in seeds]
    return Entrant(
        name, tuple(dict.fromkeys(run.learning_rate for run in runs)), seeds, {(run.learning_rate, run.seed): run for run in runs}
    )


def _last(key: str) -> str:
    """The last part of a key that says something: ``temperature`` of ``objective.temperature``, ``objective`` of ``objective.name``."""
    return key.removesuffix(".name").rpartition(".")[2]


def _run_name(name: str, rate: float | None, seed: int) -> str:
    words = [name, *([] if rate is None else [f"lr={rate:g}"]), f"seed={seed}"]
    return re.sub(r"[^A-Za-z0-9_.=,+-]+", "-", "-".join(words)).replace("=", "")
