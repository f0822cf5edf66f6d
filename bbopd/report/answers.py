"""The same prompts answered side by side, with each token coloured by how far the student was from its teacher there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from itertools import pairwise
from typing import Any

from bbopd.report.load import RunData

_STEPS = (0.1, 0.5, 1.0, 2.0, 4.0)  # nats, from which on a token has the colour
_NOTE = (
    "Colour: KL(teacher‖student) at a token, in nats, at temperature 1, given everything before it. Point at a coloured token to see "
    "what the teacher held most likely there. Answers are greedy and end after 64 tokens"
)


def run_answers(data: RunData) -> str:
    """Of one run: the student before and after, its teacher, and the true continuation where there is one."""
    parts = []
    is_coloured = False
    for sample in data.summary.get("samples") or ():
        boxes = [
            _answer("Student, before", sample.get("before"), sample.get("before_pieces")),
            _answer("Student, after", sample.get("after"), sample.get("after_pieces")),
            _answer("Teacher", sample.get("teacher")),
            _answer("True continuation", sample.get("reference")),
        ]
        is_coloured = is_coloured or bool(sample.get("after_pieces") or sample.get("before_pieces"))
        parts.append(_prompt(sample) + f'<div class="answers">{"".join(boxes)}</div>')
    return (_legend() if is_coloured else "") + "".join(parts)


def compared_answers(runs: Sequence[RunData]) -> str:
    """Of several runs: what each student says in the end to the prompts that all of them were asked."""
    by_run = [{str(sample.get("prompt")): sample for sample in run.summary.get("samples") or ()} for run in runs]
    common = [prompt for prompt in by_run[0] if all(prompt in samples for samples in by_run)]
    parts = []
    is_coloured = False
    for prompt in common:
        samples = [found[prompt] for found in by_run]
        boxes = [_answer(run.name, sample.get("after"), sample.get("after_pieces")) for run, sample in zip(runs, samples, strict=True)]
        teachers = list(dict.fromkeys(sample["teacher"] for sample in samples if sample.get("teacher")))
        boxes += [_answer("Teacher", text) for text in teachers]
        is_coloured = is_coloured or any(sample.get("after_pieces") for sample in samples)
        parts.append(_prompt(samples[0]) + f'<div class="answers">{"".join(boxes)}</div>')
    return (_legend() if is_coloured else "") + "".join(parts)


def _prompt(sample: Mapping[str, Any]) -> str:
    return f'<div class="prompt text">{escape(str(sample.get("prompt", "")))}</div>'


def _answer(title: str, text: Any, pieces: Sequence[Sequence[Any]] | None = None) -> str:
    if text is None:
        return ""
    known = [kl for _, kl, _ in pieces or () if kl is not None]
    mean = f" · {sum(known) / len(known):.2f} nats a token" if known else ""
    body = "".join(_piece(*piece) for piece in pieces) if known and pieces else escape(str(text))
    return f'<div class="answer"><h3>{escape(title)}{mean}</h3><div class="text">{body}</div></div>'


def _piece(text: str, kl: float | None, teacher: str | None) -> str:
    level = sum(kl >= step for step in _STEPS) if kl is not None else 0
    if not level:
        return escape(text)
    about = escape(f"{kl:.2f} nats; the teacher: {teacher!r}", quote=True)
    return f'<span class="k{level}" title="{about}">{escape(text)}</span>'


def _legend() -> str:
    edges = [*(f"{step:g}" for step in _STEPS), ""]
    marks = "".join(
        f'<span><span class="k{index + 1}">token</span> {f"{low} to {high}" if high else f"{low} and more"}</span>'
        for index, (low, high) in enumerate(pairwise(edges))
    )
    return f'<p class="quiet">{escape(_NOTE)}.</p><p class="legend">{marks}</p>'
