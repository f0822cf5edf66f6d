"""Models side by side on one page: how well each does on every task, what it costs to ask it, and which of them differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from html import escape

from bbopd.errors import DataError
from bbopd.report.page import SectionOf, facts, folded, quiet, whole_page
from bbopd.report.standings import Standing, Standings
from bbopd.report.tradeoffs import NOTE, letters, task_section

_SHOWN = 12  # verdicts in the open


def render_models(files: Sequence[Standings]) -> str:
    """The whole page, of one file of results or of several. Every text that comes from them is escaped. Raises `DataError` where there is
    no result."""
    standings = _told_apart(files)
    if not standings:
        raise DataError(f"{', '.join(one.name for one in files)}: there is no result yet")
    names = letters(list(dict.fromkeys(standing.model for standing in standings)))
    tasks = list(dict.fromkeys(standing.task for standing in standings))
    head = f"<h1>{_count(len(names), 'model')} on {_count(len(tasks), 'task')}</h1>" + quiet(f"{NOTE}.")
    sections = [
        SectionOf(f"Task {task}", task_section([standing for standing in standings if standing.task == task], names)) for task in tasks
    ]
    sections += [
        SectionOf("What differs", "".join(_sentences(one, len(files) > 1) for one in files)),
        SectionOf("How to repeat it", "".join(_repeating(one, len(files) > 1) for one in files)),
    ]
    return whole_page(f"bbopd: {', '.join(tasks)}", head, sections)


def _told_apart(files: Sequence[Standings]) -> list[Standing]:
    """All of them; a model that several files have on one task is called by its file too."""
    counts = Counter((standing.model, standing.task) for one in files for standing in one.standings)
    twice = {model for (model, _), count in counts.items() if count > 1}
    return [
        replace(standing, model=f"{standing.model} ({one.name})") if standing.model in twice else standing
        for one in files
        for standing in one.standings
    ]


def _sentences(one: Standings, is_named: bool) -> str:
    if not one.sentences:
        return ""
    shown, rest = one.sentences[:_SHOWN], one.sentences[_SHOWN:]
    title = f"<h3>{escape(one.name)}</h3>" if is_named else ""
    return title + _list(shown) + (folded(f"{len(rest)} more", _list(rest)) if rest else "")


def _list(sentences: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(sentence)}.</li>' for sentence in sentences)}</ul>"


def _repeating(one: Standings, is_named: bool) -> str:
    found = facts(one.facts)
    return folded(one.name, found) if is_named and found else found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number != 1 else ''}"
