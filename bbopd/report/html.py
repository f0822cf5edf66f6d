"""The page of a run: one file that opens anywhere, offline, on a phone, in light and dark."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from bbopd.errors import BbopdError
from bbopd.report.charts import charts
from bbopd.report.load import RunData, load_run
from bbopd.report.table import KL_NOTE, SPEED_NOTE, cache_line, cost_line, result_rows, speed_rows, stage_titles
from bbopd.report.timeline import NOTE, timeline_drawings

_CSS = """
:root{color-scheme:light dark;--page:#fcfcfb;--card:#fff;--ink:#22262b;--quiet:#646b75;--faint:#c3c8d0;
 --series-1:#2563ad;--series-2:#c2571a;--series-3:#2c8556;--series-4:#8a4fa8}
@media (prefers-color-scheme:dark){:root{--page:#15181c;--card:#1d2126;--ink:#e4e7eb;--quiet:#98a1ad;--faint:#4a525d;
 --series-1:#6fa8e8;--series-2:#ee9659;--series-3:#63c08f;--series-4:#c391de}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem 1rem 3rem;max-width:64rem;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:1.45rem;margin:0 0 .2rem}h2{font-size:1.1rem;margin:2rem 0 .6rem}p{margin:.3rem 0}
.quiet{color:var(--quiet)}.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .8rem .3rem 0;text-align:right;border-bottom:1px solid var(--faint);white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:9rem}thead th{font-weight:600;color:var(--quiet)}
td:last-child{font-weight:600}.facts td{text-align:left;font-weight:400;white-space:normal;overflow-wrap:anywhere}
.facts th{text-align:left;font-weight:400;color:var(--quiet)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:1rem}
figure,.answer,.prompt{margin:0;padding:.7rem;background:var(--card);border:1px solid var(--faint);border-radius:6px}
svg{display:block;width:100%;height:auto}svg *{stroke-linejoin:round;stroke-linecap:butt}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr));gap:.7rem;margin:.7rem 0 1.4rem}
.answer h3{margin:0 0 .3rem;font-size:.85rem;color:var(--quiet)}.text{white-space:pre-wrap;overflow-wrap:anywhere}
pre{overflow-x:auto;padding:.7rem;background:var(--card);border:1px solid var(--faint);border-radius:6px;font-size:12.5px}
summary{cursor:pointer}
"""


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run's folder, from whatever files are there, and return its path.

    Raises `DataError` where the folder holds no run, `BbopdError` where the page cannot be written.
    """
    path = Path(run_dir) / "report.html"
    page = render(load_run(run_dir))
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BbopdError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def render(data: RunData) -> str:
    """The whole page. Every text that comes from the run is escaped."""
    sections = [
        _head(data),
        _section("Result", _result(data)),
        _section("Curves", _drawings(data)),
        _section("Where the time went", _speeds(data)),
        _section("What each stage did", _timeline(data)),
        _section("The same prompts, answered", _samples(data.summary.get("samples") or ())),
        _section("What became of the sequences drawn", _sequences(data.summary)),
        _section("Machine and versions", _facts(_flatten({**(data.about("machine") or {}), "source": data.about("source") or {}}))),
        _section("Configuration", _configuration(data.about("config"))),
    ]
    title = escape(f"bbopd: {data.name}")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head>\n<body>\n" + "\n".join(filter(None, sections)) + "\n</body></html>\n"
    )


def _head(data: RunData) -> str:
    lines = [
        ("Status", data.status),
        ("Error", data.summary.get("error")),
        ("Started", data.about("started")),
        ("Command", data.about("command")),
        ("Model", data.summary.get("model_path")),
        ("Cost of the teacher", cost_line(data)),
        ("Cache of the teacher", cache_line(data)),
    ]
    known = [(name, str(value)) for name, value in lines if value]
    return f"<h1>Distillation run {escape(data.name)}</h1>{_facts(known)}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>" if body else ""


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
        return '<p class="quiet">No evaluation was finished.</p>'
    note = (
        f'<p class="quiet">{escape(KL_NOTE)}. Bits per byte do not depend on the tokenizer. '
        "± is a standard error with sequences as clusters.</p>"
    )
    return _table(("Measure", *stage_titles(data), "unit", "change"), rows) + note


def _drawings(data: RunData) -> str:
    found = charts(data)
    return '<div class="charts">' + "".join(f"<figure>{svg}</figure>" for _, svg in found) + "</div>" if found else ""


def _speeds(data: RunData) -> str:
    rows = [(row.title, row.tokens, row.seconds, row.busy, row.speed, row.share) for row in speed_rows(data)]
    if not rows:
        return ""
    return (
        _table(("Activity", "tokens", "seconds", "busy", "tokens/s", "share"), rows)
        + f'<p class="quiet">{escape(SPEED_NOTE)}.{_pushes(data)}</p>'
    )


def _pushes(data: RunData) -> str:
    """One share for each push: steps of one cycle repeat that of their cycle."""
    shares = list({line.get("cycle"): float(line["push_share"]) for line in data.metrics if "push_share" in line}.values())
    if not shares:
        return ""
    mean = sum(shares) / len(shares)
    return f" Of the time from one push of weights to the next, {mean:.1%} went into the push (at most {max(shares):.1%})."


def _timeline(data: RunData) -> str:
    found = timeline_drawings(data)
    if not found:
        return ""
    return "".join(f"<figure>{svg}</figure>" for _, svg in found) + f'<p class="quiet">{escape(NOTE)}.</p>'


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    parts = []
    for sample in samples:
        answers = (("Student, before", "before"), ("Student, after", "after"), ("Teacher", "teacher"))
        boxes = "".join(
            f'<div class="answer"><h3>{title}</h3><div class="text">{escape(str(sample[key]))}</div></div>'
            for title, key in answers
            if sample.get(key) is not None
        )
        parts.append(f'<div class="prompt text">{escape(str(sample.get("prompt", "")))}</div><div class="answers">{boxes}</div>')
    return "".join(parts)


def _sequences(summary: Mapping[str, Any]) -> str:
    counts = summary.get("sequences") or {}
    total = ", ".join(f"{count:,} {what}" for what, count in counts.items())
    reasons = sorted((summary.get("rejected") or {}).items())
    table = _table(("Rejected because", "sequences"), [(reason.replace("_", " "), f"{count:,}") for reason, count in reasons])
    return (f"<p>{escape(total)}.</p>" if total else "") + (table if reasons else "")


def _configuration(config: Any) -> str:
    if not config:
        return ""
    return f"<details><summary>All of it, resolved</summary><pre>{escape(json.dumps(config, indent=2, ensure_ascii=False))}</pre></details>"


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(pairs: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            pairs.extend(_flatten(value, f"{prefix}{key} "))
        else:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs
