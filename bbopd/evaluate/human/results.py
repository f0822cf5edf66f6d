"""From ratings to figures: win rates and mean scores with intervals over prompts, and how far people agree."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bbopd.evaluate.human.comparisons import SIDES, Key
from bbopd.evaluate.human.raters import ordinal_alpha
from bbopd.evaluate.human.ratings import QUESTIONS, Rating

_RESAMPLES = 10_000
_SEED = 0


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over prompts with its 95% bootstrap interval; ``low`` and ``high`` are None for a single prompt."""

    value: float
    low: float | None
    high: float | None
    prompts: int


@dataclass(frozen=True, slots=True)
class WinRate:
    """How often ``model`` was preferred to ``against``, ties counted half."""

    model: str
    against: str
    rate: Interval
    wins: int
    ties: int
    losses: int


@dataclass(frozen=True, slots=True)
class MeanScore:
    model: str
    question: str
    score: Interval
    ratings: int


@dataclass(frozen=True, slots=True)
class HumanResult:
    """``agreement`` by question: Krippendorff's alpha, None where nothing was rated twice. ``side_a``: its win rate, 0.5 without a bias."""

    raters: Mapping[str, int]
    items: int
    win_rates: tuple[WinRate, ...]
    scores: tuple[MeanScore, ...]
    agreement: Mapping[str, float | None]
    rated_twice: int
    side_a: Interval

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def collect(ratings: Sequence[Rating], key: Key) -> HumanResult:
    """Put names back to sides, and add up.

    Every prompt counts the same: its value is the mean over the people who rated it and, where more than two models were compared,
    over the pairs in which a model stood. Intervals resample prompts, 10,000 times.
    """
    wins: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    scores: defaultdict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    preferences: defaultdict[str, list[float]] = defaultdict(list)
    values: defaultdict[tuple[str, str, str], list[float]] = defaultdict(list)
    raters: defaultdict[str, int] = defaultdict(int)
    for rating in ratings:
        prompt, models = key.prompts[rating.item_id], key.models[rating.item_id]
        raters[rating.rater] += 1
        pair = (min(models), max(models))
        preference = rating.preference if models == pair else 1.0 - rating.preference
        wins[pair].append((prompt, preference))
        preferences[rating.item_id].append(preference)
        for question in QUESTIONS:
            for side, model, score in zip(SIDES, models, rating.scores[question], strict=True):
                scores[model, question].append((prompt, float(score)))
                values[question, rating.item_id, side].append(float(score))
    agreement = {"preference": ordinal_alpha(preferences.values())} | {
        question: ordinal_alpha(found for (asked, _, _), found in values.items() if asked == question) for question in QUESTIONS
    }
    return HumanResult(
        raters=dict(sorted(raters.items())),
        items=len(preferences),
        win_rates=tuple(_win_rate(pair, found) for pair, found in sorted(wins.items())),
        scores=tuple(
            MeanScore(model, question, mean_over_prompts(found), len(found)) for (model, question), found in sorted(scores.items())
        ),
        agreement=agreement,
        rated_twice=sum(len(found) > 1 for found in preferences.values()),
        side_a=mean_over_prompts([(key.prompts[rating.item_id], rating.preference) for rating in ratings]),
    )


def mean_over_prompts(values: Sequence[tuple[int, float]]) -> Interval:
    """The mean over prompts of the mean of each one's values, given as (prompt, value), with its percentile bootstrap interval."""
    by_prompt: defaultdict[int, list[float]] = defaultdict(list)
    for prompt, value in values:
        by_prompt[prompt].append(value)
    means = np.array([np.mean(by_prompt[prompt]) for prompt in sorted(by_prompt)])
    if len(means) < 2:
        return Interval(float(means.mean()), None, None, len(means))
    drawn = np.random.default_rng(_SEED).integers(len(means), size=(_RESAMPLES, len(means)))
    low, high = np.quantile(means[drawn].mean(axis=1), (0.025, 0.975))
    return Interval(float(means.mean()), float(low), float(high), len(means))


def _win_rate(pair: tuple[str, str], found: Sequence[tuple[int, float]]) -> WinRate:
    counts = [sum(preference == value for _, preference in found) for value in (1.0, 0.5, 0.0)]
    return WinRate(*pair, mean_over_prompts(found), *counts)
