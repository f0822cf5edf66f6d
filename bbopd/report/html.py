"""The page of a run: one file that opens anywhere, offline, on a phone, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from bbopd.report.answers import run_answers
from bbopd.report.charts import charts
from bbopd.report.load import RunData, load_run, short_name
from bbopd.report.page import SectionOf, facts, figures, flatten, folded, quiet, table, tiles, whole_page, write_page
from bbopd.report.table import (
    KL_NOTE,
    SPEED_NOTE,
    cache_line,
    cost_line,
    energy_line,
    restarts_line,
    result_rows,
    speed_rows,
    stage_titles,
    updates_line,
)
from bbopd.report.timeline import NOTE, timeline_drawings


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's folder, from whatever files are there, and return its path.

    Raises `DataError` where the folder holds no run, `BbopdError` where the page cannot be written.
    """
    return write_page(Path(run_dir) / "report.html", render(load_run(run_dir)))


def render(data: RunData) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    sections = [
        SectionOf("Result", _result(data)),
        SectionOf("The same prompts, answered", run_answers(data)),
        SectionOf("Curves", figures(charts(data), kind="charts")),
        SectionOf("Where the time went", _speeds(data)),
        SectionOf("What each stage did", _timeline(data)),
        SectionOf("What became of the sequences drawn", _sequences(data.summary)),
        SectionOf("Money and energy", facts(spending(data))),
        SectionOf("How to repeat it", repeating(data)),
    ]
    return whole_page(f"bbopd: {data.name}", _head(data), sections)


def spending(data: RunData) -> list[tuple[str, str]]:
    lines = [
        ("Cost of the teacher", cost_line(data)),
        ("Cache of the teacher", cache_line(data)),
        ("Updates", updates_line(data)),
        ("Started again", restarts_line(data)),
        ("Energy", energy_line(data)),
    ]
    return [(name, line) for name, line in lines if line]


def repeating(data: RunData) -> str:
    """Command, seed, data, versions, and the whole configuration."""
    config: Mapping[str, Any] = data.about("config") or {}
    machine: Mapping[str, Any] = data.about("machine") or {}
    source: Mapping[str, Any] = data.about("source") or {}
    lines = [
        ("Command", data.about("command")),
        ("Started", data.about("started")),
        ("Seed", (config.get("train") or {}).get("seed")),
        ("SHA-256 of the data", data.about("data_sha256")),
        ("Model", data.summary.get("model_path")),
        *flatten({key: value for key, value in machine.items() if key != "versions"}),
        ("Versions", ", ".join(f"{name} {version}" for name, version in (machine.get("versions") or {}).items())),
        ("Commit", source.get("commit") and f"{source['commit']} and {source.get('changed_files', 0)} changed files"),
    ]
    known = facts((name, str(value)) for name, value in lines if value not in (None, ""))
    if not config:
        return known
    return known + folded("Configuration, all of it, resolved", f"<pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre>")


def _head(data: RunData) -> str:
    status = f'<span class="status {escape(data.status)}">{escape(data.status)}</span>'
    error = data.summary.get("error")
    return (
        f"<h1>Distillation run {escape(data.name)}{status}</h1>"
        + (f'<p class="lead">{escape(in_a_sentence(data))}</p>' if data.about("config") else "")
        + (f'<p class="error">{escape(str(error))}</p>' if error else "")
        + tiles(_key_figures(data))
    )


def in_a_sentence(data: RunData) -> str:
    """Who learned what from whom."""
    config: Mapping[str, Any] = data.about("config") or {}
    student, teacher, objective = (config.get(key) or {} for key in ("student", "teacher", "objective"))
    layers = (student.get("init") or {}).get("keep_layers")
    of_layers = f" ({len(layers)} of its layers)" if layers else ""
    named = (data.summary.get("teacher") or {}).get("model") or (teacher.get("serve") or {}).get("model") or teacher.get("target")
    sentence = f"Student: {short_name(student.get('model', 'unknown'))}{of_layers}."
    if teacher.get("signal") not in (None, "none"):
        sentence += f" Teacher: {short_name(named)}, heard by its {teacher['signal']} signal."
    return sentence + (f" Objective: {objective['name']}." if "name" in objective else "")


def _key_figures(data: RunData) -> list[tuple[str, str]]:
    figures = [(f"{row.title}, from {row.values[0]} to {row.values[-1]}", row.change) for row in result_rows(data) if row.change][:3]
    tokens = (data.summary.get("tokens") or {}).get("trained") or (data.trained_tokens[-1] if data.metrics else 0)
    seconds = sum(float(value) for value in (data.summary.get("seconds") or {}).values())
    if tokens:
        figures.append(("response tokens trained", f"{tokens:,}"))
    if seconds:
        figures.append(("time, all together", duration(seconds)))
    return figures


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.0f} s"


def _result(data: RunData) -> str:
    rows = [
        (
            row.title,
            *(f"{value} ± {error}" if error else value for value, error in zip(row.values, row.errors, strict=True)),
            row.unit,
            row.change,
        )
        for row in result_rows(data)
    ]
    if not rows:
        return quiet("No evaluation was finished.")
    note = (
        f"{KL_NOTE}. Bits per byte do not depend on the tokenizer. ± is a standard error with sequences as clusters: about two of them to "
        "either side make a 95% interval."
    )
    return table(("Measure", *stage_titles(data), "unit", "change"), rows, kind="result") + quiet(note)


def _speeds(data: RunData) -> str:
    rows = [(row.title, row.tokens, row.seconds, row.busy, row.speed, row.share) for row in speed_rows(data)]
    if not rows:
        return ""
    return table(("Activity", "tokens", "seconds", "busy", "tokens/s", "share"), rows) + quiet(f"{SPEED_NOTE}.{_pushes(data)}")


def _pushes(data: RunData) -> str:
    """One share for each push: steps of one cycle repeat that of their cycle."""
    shares = list({line.get("cycle"): float(line["push_share"]) for line in data.metrics if "push_share" in line}.values())
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return f" Of the time from one push of weights to the next, {mean:.1%} went into the push (at most {max(shares):.1%})."


def _timeline(data: RunData) -> str:
    found = timeline_drawings(data)
    return figures(found, kind="stages") + quiet(f"{NOTE}.") if found else ""


def _sequences(summary: Mapping[str, Any]) -> str:
    counts = summary.get("sequences") or {}
    total = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    reasons = sorted((summary.get("rejected") or {}).items())
    rows = [(reason.replace("_", " "), f"{count:,}") for reason, count in reasons]
    return (f"<p>{escape(total)}.</p>" if total else "") + (table(("Rejected because", "sequences"), rows) if rows else "")
