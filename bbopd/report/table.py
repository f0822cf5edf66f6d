"""A run's result as rows, and those rows as a table for the terminal or as plain lines. The page shows the same rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bbopd.report.load import Line, RunData, load_run

STAGE_TITLES = {"start": "start", "cold_start": "cold start", "end": "end"}
SPEED_NOTE = (
    "seconds: those that belong to this activity alone, so that they add up; scoring's are those in which only the teacher was waited for. "
    "Busy: those in which it was under way, whatever else was; tokens/s are over these"
)
KL_NOTE = "KL in nats per response token at temperature 1; forward: KL(teacher‖student), reverse: KL(student‖teacher)"


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure of an evaluation; ``is_share`` ones lie in [0, 1] and are shown in percent."""

    key: str
    title: str
    unit: str
    is_share: bool = False


MEASURES = (
    Measure("bits_per_byte", "Bits per byte, held-out text", "bits/byte"),
    Measure("kl_rollouts", "Forward KL, own rollouts", "nats/token"),
    Measure("kl_held_out", "Forward KL, held-out text", "nats/token"),
    Measure("reverse_kl_rollouts", "Reverse KL, own rollouts", "nats/token"),
    Measure("reverse_kl_held_out", "Reverse KL, held-out text", "nats/token"),
    Measure("top1_rollouts", "Top-1 agreement, own rollouts", "of tokens", is_share=True),
    Measure("top1_held_out", "Top-1 agreement, held-out text", "of tokens", is_share=True),
    Measure("win_rate", "Win rate against the teacher's answers", "of pairs", is_share=True),
    Measure("discriminator_accuracy", "Discriminator, held-out prompts", "of pairs", is_share=True),
    Measure("discriminator_margin", "Teacher's lead in its score, held-out prompts", ""),
    Measure("length_drift", "Length beyond the teacher's, held-out prompts", "of tokens", is_share=True),
)


@dataclass(frozen=True, slots=True)
class Row:
    """A measure's text at every stage, its standard errors there, and what changed from the first stage to the last."""

    title: str
    unit: str
    values: tuple[str, ...]
    errors: tuple[str, ...]
    change: str


@dataclass(frozen=True, slots=True)
class SpeedRow:
    """One activity: tokens that went through it, seconds of its own, those under way, tokens per second of these, share of the run."""

    title: str
    tokens: str
    seconds: str
    busy: str
    speed: str
    share: str


def measures_of(lines: Iterable[Line]) -> list[Measure]:
    """Those of `MEASURES` that any of ``lines`` (of evals.jsonl) tells, then the metrics of tasks, by task."""
    found = list(lines)
    known = [measure for measure in MEASURES if any(line.get(measure.key) is not None for line in found)]
    lower = {key for line in found for key in line.get("lower_is_better") or ()}
    of_tasks = dict.fromkeys(key for line in found for key in line if "." in key)
    return known + [Measure(key, ": ".join(split_key(key)), "lower is better" if key in lower else "") for key in of_tasks]


def split_key(key: str) -> tuple[str, str]:
    """Task and metric of ``task.metric``."""
    task, _, metric = key.rpartition(".")
    return task, metric


def stage_titles(data: RunData) -> list[str]:
    return [STAGE_TITLES.get(str(line.get("stage")), f"step {line.get('step', '?')}") for line in data.stages]


def result_rows(data: RunData) -> list[Row]:
    """The measures that any stage has, as `measures_of` orders them."""
    stages = data.stages
    rows = []
    for measure in measures_of(stages):
        numbers = [line.get(measure.key) for line in stages]
        values = tuple(_text(number, measure) for number in numbers)
        errors = tuple(_text((line.get("standard_errors") or {}).get(measure.key), measure) for line in stages)
        is_bucketed = measure.unit == "nats/token" and any(line.get("kl_is_bucketed") for line in stages)
        title = measure.title + (" (bucketed)" if is_bucketed else "")
        rows.append(Row(title, measure.unit, values, errors, change(numbers, is_share=measure.is_share)))
    return rows


def end_row(data: RunData, measure: Measure) -> str:
    """A measure as the run's last evaluation has it, with its standard error."""
    line = data.stages[-1] if data.stages else {}
    value, error = _text(line.get(measure.key), measure), _text((line.get("standard_errors") or {}).get(measure.key), measure)
    return f"{value} ± {error}" if error else value


def speed_rows(data: RunData) -> list[SpeedRow]:
    """Where the time went, longest first."""
    seconds = _numbers(data.summary.get("seconds"))
    busy = _numbers(data.summary.get("busy_seconds"))
    speeds = _numbers(data.summary.get("tokens_per_second"))
    tokens = _numbers(data.summary.get("tokens"))
    # the summary counts tokens by what was done to them, seconds by the doing
    tokens_of = {"sampling": tokens.get("sampled"), "scoring": tokens.get("scored"), "training": tokens.get("trained")}
    total = sum(seconds.values())
    names = sorted({*seconds, *speeds}, key=lambda name: -seconds.get(name, 0.0))
    return [
        SpeedRow(
            name.replace("_", " "),
            "" if tokens_of.get(name) is None else f"{tokens_of[name]:,.0f}",
            f"{seconds[name]:,.1f}" if name in seconds else "",
            f"{busy[name]:,.1f}" if name in busy else "",
            f"{speeds[name]:,.0f}" if name in speeds else "",
            f"{seconds[name] / total:.0%}" if name in seconds and total > 0 else "",
        )
        for name in names
    ]


def cost_line(data: RunData) -> str:
    """What the teacher has cost, all attempts at the run together; empty where it costs nothing that is known."""
    cost = data.summary.get("teacher_cost")
    if not cost:
        return ""
    line = f"{cost['paid'] + cost['reserved']:.6g} {cost['currency']}" + (f" of {cost['limit']:.6g}" if cost["limit"] else "")
    line += f", {cost['requests']:,} requests, {cost['prompt_tokens'] + cost['answer_tokens']:,} tokens"
    return line + (f"; {cost['reserved']:.3g} of it for requests whose outcome is not known" if cost["reserved"] else "")


def updates_line(data: RunData) -> str:
    """Updates that were not applied, by what was wrong, and those that were undone; empty where there are none."""
    bad, back = data.summary.get("bad_updates"), data.summary.get("rolled_back") or {}
    if not bad:
        return ""
    line = ", ".join(f"{count:,} {kind.replace('_', ' ')}" for kind, count in sorted(bad.items()))
    line += f" not applied ({data.summary['skipped_tokens']:,} tokens)"
    return line + (f"; {back['updates']:,} rolled back ({back['tokens']:,} tokens)" if back.get("updates") else "")


def restarts_line(data: RunData) -> str:
    """What was started again on a cluster, by kind; empty where nothing was, or there is no cluster."""
    restarts = data.summary.get("restarts") or {}
    return ", ".join(f"{kind} {count:,}" for kind, count in restarts.items() if count)


def energy_line(data: RunData) -> str:
    """What the machine has drawn, by its own counters, all sessions together; says so where nothing counts."""
    energy = data.summary.get("energy")
    if energy is None:
        return "" if "energy" not in data.summary else "unknown: neither RAPL nor NVML could be read here"
    joules = float(energy["joules"])
    return f"{joules / 3.6e6:.3g} kWh ({joules:,.0f} J) by {', '.join(energy['covers'])}; whatever else ran there is in it"


def cache_line(data: RunData) -> str:
    """How much of what the teacher was asked it had been asked before, in the last session of the run; empty where nothing is kept."""
    counts = data.summary.get("teacher_cache")
    if not counts:
        return ""
    asked = counts["hits"] + counts["misses"]
    lost = "".join(f", {counts[name]:,} {name}" for name in ("unstored", "corrupt") if counts[name])
    return f"{counts['hits']:,} of {asked:,} answers were kept from before{lost}"


def change(numbers: Sequence[float | None], *, is_share: bool) -> str:
    """From the first known number to the last: relative in percent, or, for a share, in percentage points."""
    known = [number for number in numbers if number is not None]
    if len(known) < 2:
        return ""
    first, last = known[0], known[-1]
    if is_share:
        return f"{100 * (last - first):+.1f} points"
    return f"{100 * (last / first - 1):+.1f}%" if first else ""


def result_table(run: RunData | str | Path) -> Table:
    """The result for a terminal: every measure at start, after the cold start and at the end, with its change."""
    data = run if isinstance(run, RunData) else load_run(run)
    table = Table(
        title=f"Result of {data.name} ({data.status})", title_justify="left", caption=KL_NOTE, caption_justify="left", box=SIMPLE_HEAD
    )
    table.add_column("Measure")
    for title in stage_titles(data):
        table.add_column(title, justify="right")
    table.add_column("change", justify="right", style="bold")
    for row in result_rows(data):
        table.add_row(row.title, *row.values, row.change)
    return table


def speed_table(run: RunData | str | Path) -> Table:
    """Where the time went, for a terminal."""
    data = run if isinstance(run, RunData) else load_run(run)
    table = Table(title="Where the time went", title_justify="left", caption=SPEED_NOTE, caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("Activity")
    for title in ("tokens", "seconds", "busy", "tokens/s", "share"):
        table.add_column(title, justify="right")
    for row in speed_rows(data):
        table.add_row(row.title, row.tokens, row.seconds, row.speed, row.share)
    return table


def plain_lines(run: RunData | str | Path) -> list[str]:
    """Both tables as lines of text, for a log."""
    data = run if isinstance(run, RunData) else load_run(run)
    lines = [f"result of {data.name} ({data.status}): {' -> '.join(stage_titles(data)) or 'no evaluation'}"]
    for row in result_rows(data):
        lines.append(
            f"{row.title}: {' -> '.join(value or '-' for value in row.values)} {row.unit}" + (f" ({row.change})" if row.change else "")
        )
    if cost := cost_line(data):
        lines.append(f"cost of the teacher: {cost}")
    if updates := updates_line(data):
        lines.append(f"updates: {updates}")
    if restarts := restarts_line(data):
        lines.append(f"started again: {restarts}")
    speeds = speed_rows(data)
    for speed in speeds:
        parts = [
            f"{speed.seconds} s" if speed.seconds else "",
            speed.share,
            f"busy {speed.busy} s" if speed.busy else "",
            f"{speed.speed} tokens/s" if speed.speed else "",
        ]
        lines.append(f"{speed.title}: {', '.join(part for part in parts if part)}")
    return [*lines, f"({SPEED_NOTE})"] if speeds else lines


def _text(number: float | None, measure: Measure) -> str:
    if number is None:
        return ""
    return f"{number:.1%}" if measure.is_share else f"{number:.3f}"


def _numbers(mapping: Any) -> dict[str, float]:
    return {str(key): float(value) for key, value in (mapping or {}).items() if isinstance(value, int | float)}
