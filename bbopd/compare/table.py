"""The comparison for people: one table and one sentence a pair, for the terminal and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from bbopd.compare.verdict import Pair, Row, title, words
from bbopd.config_compare import is_share
from bbopd.evaluate.crossed import Interval

SPENT_NOTE = (
    "tokens: response tokens trained on; seconds: of sampling, scoring and training; asked: sequences that the teacher scored or wrote for "
    "training; KL: from the teacher, on the student's own text, nats a token. All are means over the seeds, a cold start included"
)


def heads(rows: Sequence[Row], measure: str, confidence: float) -> list[str]:
    others = sorted({name for row in rows for name in row.tested} - {measure})
    return [
        "arm",
        "learning rate",
        "seeds",
        *(f"{title(name)} ({confidence:.0%} interval)" for name in (measure, *others)),
        "KL",
        "tokens",
        "updates",
        "seconds",
        "asked",
    ]


def cells(row: Row, rows: Sequence[Row], measure: str) -> list[str]:
    others = sorted({name for other in rows for name in other.tested} - {measure})
    kl = row.figures.get("kl_rollouts")
    return [
        f"{row.name} (reference)" if row.is_reference else row.name,
        "" if row.learning_rate is None else f"{row.learning_rate:g}",
        "" if row.is_reference else str(len(row.seeds)),
        *(_estimate(name, row.tested.get(name)) for name in (measure, *others)),
        "" if kl is None else f"{kl:.3f}",
        *(f"{row.spent[name]:,.0f}" if row.spent else "" for name in ("student_tokens", "updates", "seconds", "teacher_sequences")),
    ]


def rich_table(rows: Sequence[Row], measure: str, confidence: float) -> Table:
    table = Table(caption=SPENT_NOTE, caption_justify="left", box=SIMPLE_HEAD)
    for number, head in enumerate(heads(rows, measure, confidence)):
        table.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*cells(row, rows, measure))
    return table


def sentences(pairs: Sequence[Pair], measure: str, confidence: float) -> list[str]:
    """A verdict for each pair: first those that differ, the largest difference before the others."""
    ordered = sorted(pairs, key=lambda pair: (pair.better is None, -abs(pair.difference.value)))
    return [words(pair, measure, confidence) for pair in ordered]


def markdown(rows: Sequence[Row], pairs: Sequence[Pair], measure: str, confidence: float) -> str:
    """The same, for a document."""
    titles = heads(rows, measure, confidence)
    lines = ["| " + " | ".join(titles) + " |", "|" + "|".join(["---", *["---:"] * (len(titles) - 1)]) + "|"]
    lines += ["| " + " | ".join(cells(row, rows, measure)) + " |" for row in rows]
    lines += ["", SPENT_NOTE[0].upper() + SPENT_NOTE[1:] + ".", ""]
    tried = [
        f"{row.name}: " + ", ".join(f"{rate} {_value(measure, value)}" for rate, value in row.tried.items()) for row in rows if row.tried
    ]
    if tried:
        lines += [f"Learning rates tried, with {title(measure)} on the development questions:", "", *(f"* {line}" for line in tried), ""]
    if pairs:
        several = f", adjusted for all {len(pairs)} pairs (Holm)" if len(pairs) > 1 else ""
        lines += [f"Verdicts, by {title(measure)}; intervals are over seeds and questions, p is two-sided{several}:", ""]
        lines += [f"* {sentence}" for sentence in sentences(pairs, measure, confidence)]
    return "\n".join(lines).rstrip() + "\n"


def _estimate(measure: str, found: Interval | None) -> str:
    if found is None:
        return ""
    low, high = (max(0.0, found.low), min(1.0, found.high)) if is_share(measure) else (found.low, found.high)
    return f"{_value(measure, found.value)} ({_value(measure, low)} to {_value(measure, high)})"


def _value(measure: str, value: float) -> str:
    return f"{value:.1%}" if is_share(measure) else f"{value:.4f}"
