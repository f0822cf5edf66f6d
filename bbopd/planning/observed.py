"""Rates as a run had them, read from the timeline that it left: tokens and seconds of every cycle, and of these the middle half."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from bbopd.config import RunConfig
from bbopd.errors import ConfigError
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.trace import Span, read_spans
from bbopd.planning.rates import Rates
from bbopd.planning.tokens import mean

__all__ = ["rates_of_run"]

_STAGES = ("sampling", "scoring", "training")
_PUSH = "push of weights"
_GROUP = "group "  # how the spans of a sampler begin that works ahead


@dataclass(frozen=True, slots=True)
class _Cycle:
    """From the end of the training before it to the end of its own: tokens and seconds by stage, and of what is no stage."""

    whole: float
    tokens: dict[str, int]
    seconds: dict[str, float]
    push: float
    other: float
    answers: list[int]


def rates_of_run(root: str | Path, *, gpus: int = 1, engines: int = 1) -> Rates:
    """As the run in the folder ``root`` had them on so many GPUs, from its second cycle on: the first one pays for what happens once.

    Of the others the middle half counts. Where stages took turns, a stage's seconds are those in which nothing else was under way. Raises
    `ConfigError` where the folder holds too little of a run.
    """
    folder = RunFolder(Path(root))
    trace, known = folder.read_json("trace.json"), folder.read_json("run.json")
    if trace is None or known is None:
        raise ConfigError(f"{root} holds no run.json and trace.json: give the output folder of a run that has trained")
    cycles = _cycles(read_spans(trace))
    if not cycles:
        raise ConfigError(f"the run in {root} has trained no more than one update cycle: let it go on a little longer")
    written = [cycle for cycle in cycles if cycle.tokens["sampling"]] or cycles  # none of the cold start
    usual = _usual(written)
    answers = [tokens for cycle in written for tokens in cycle.answers]
    prompt, reference = _lengths(folder, RunConfig.model_validate(known["config"]))
    found = {stage: _rate(usual, stage) for stage in _STAGES}
    return Rates(
        sampling=found["sampling"],
        scoring=found["scoring"],
        training=found["training"],
        push=mean([cycle.push for cycle in usual]),
        other=mean([cycle.other for cycle in usual]),
        answer_tokens=mean(answers) or None,
        prompt_tokens=prompt,
        reference_tokens=reference,
        gpus=gpus,
        engines=engines,
        source=str(root),
    )


def _lengths(folder: RunFolder, config: RunConfig) -> tuple[float | None, float | None]:
    """Mean tokens of a prompt, and of a labelled continuation, in the cycles after the cold start."""
    lines = [line for line in folder.read_lines("metrics.jsonl") if line["phase"] != "cold_start"]
    cycles = len({line["cycle"] for line in lines})
    if not cycles:
        return None, None
    prompts = sum(line["packed_tokens"] - line["tokens"] for line in lines) / (cycles * config.rollouts.per_update)
    labelled = config.rollouts.per_update - config.rollouts_per_cycle
    return prompts, sum(line["labelled_tokens"] for line in lines) / (cycles * labelled) if labelled else None


def _usual(cycles: Sequence[_Cycle]) -> list[_Cycle]:
    """The middle half of them, by seconds for a trained token: neither what was lucky nor what was disturbed."""
    ordered = sorted(cycles, key=lambda cycle: cycle.whole / max(1, cycle.tokens["training"]))
    quarter = len(ordered) // 4
    return ordered[quarter : len(ordered) - quarter]


def _rate(cycles: Sequence[_Cycle], stage: str) -> float | None:
    tokens, seconds = sum(cycle.tokens[stage] for cycle in cycles), sum(cycle.seconds[stage] for cycle in cycles)
    return tokens / seconds if tokens and seconds else None


def _cycles(spans: Sequence[Span]) -> list[_Cycle]:
    steps: defaultdict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.lane == "training" and "cycle" in span.about:
            steps[int(span.about["cycle"])].append(span)
    ordered = sorted(spans, key=lambda span: span.end)
    times = [span.end for span in ordered]
    overlaps = any(span.lane == "sampling" and span.name.startswith(_GROUP) for span in spans)
    ends = {cycle: max(step.end for step in of_cycle) for cycle, of_cycle in steps.items()}
    return [
        _cycle(ordered[bisect_right(times, ends[before]) : bisect_right(times, ends[cycle])], ends[cycle] - ends[before], overlaps)
        for before, cycle in pairwise(sorted(ends))
        if cycle == before + 1  # the trace of a long run has a gap in the middle
    ]


def _cycle(spans: Sequence[Span], seconds_of_cycle: float, overlaps: bool) -> _Cycle:
    """Of the ``spans`` that end in it."""
    items = {stage: [span for span in spans if span.lane == stage and not span.is_alone] for stage in _STAGES}
    alone = [span for span in spans if span.is_alone and not span.name.startswith(("wait: ", _GROUP))]
    seconds = {stage: _covered(items[stage] if overlaps else [span for span in alone if span.name == stage]) for stage in _STAGES}
    seconds["training"] = _covered([span for span in alone if span.lane == "training"])
    items["training"] = [span for span in alone if "tokens" in span.about]
    tokens = {stage: sum(int(span.about["tokens"]) for span in found) for stage, found in items.items()}
    answers = [int(span.about["tokens"]) for span in items["sampling"]]
    push = _covered([span for span in alone if span.name == _PUSH])
    other = 0.0 if overlaps else max(0.0, seconds_of_cycle - _covered(alone))
    return _Cycle(seconds_of_cycle, tokens, seconds, push, other, answers)


def _covered(spans: Sequence[Span]) -> float:
    """Seconds in which at least one of them is under way."""
    covered, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        covered += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return covered
