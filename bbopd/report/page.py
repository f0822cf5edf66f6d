"""Pieces of HTML that the pages are made of. Every text that is given to them is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from bbopd.errors import BbopdError

_STYLE = Path(__file__).with_name("style.css")


@dataclass(frozen=True, slots=True)
class SectionOf:
    """A heading and what is below it, as HTML; left out of the page where there is nothing."""

    title: str
    body: str


def write_page(path: Path, page: str) -> Path:
    """Write a whole page, or nothing. Raises `BbopdError`."""
    temporary = path.with_suffix(".tmp")
    try:
        temporary.write_text(page, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise BbopdError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def whole_page(title: str, head: str, sections: Iterable[SectionOf]) -> str:
    """One file that opens anywhere, offline: ``head``, links to the sections, and these."""
    found = [section for section in sections if section.body]
    links = "".join(f'<a href="#{_anchor(section.title)}">{escape(section.title)}</a>' for section in found)
    bodies = "\n".join(
        f'<section><h2 id="{_anchor(section.title)}">{escape(section.title)}</h2>{section.body}</section>' for section in found
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE.read_text(encoding='utf-8')}</style></head>\n"
        f"<body>\n<header>{head}<nav>{links}</nav></header>\n<main>\n{bodies}\n</main>\n</body></html>\n"
    )


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Large figures with what they are."""
    boxes = "".join(f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in pairs)
    return f'<div class="tiles">{boxes}</div>' if boxes else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", keys: Sequence[str] = ()) -> str:
    """``keys``: a colour (a CSS variable's name) before each title but the first."""
    marks = ["", *(f'<span class="key" style="background:var(--{key})"></span>' for key in keys)]
    marks += [""] * (len(titles) - len(marks))
    head = "".join(f"<th>{mark}{escape(title)}</th>" for mark, title in zip(marks, titles, strict=True))
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in pairs)
    return f'<table class="facts"><tbody>{rows}</tbody></table>' if rows else ""


def figures(drawings: Iterable[tuple[str, str]], *, kind: str = "") -> str:
    """Drawings, given as (title, SVG element)."""
    found = "".join(f"<figure>{svg}</figure>" for _, svg in drawings)
    return f'<div class="{kind}">{found}</div>' if found and kind else found


def folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def quiet(text: str) -> str:
    return f'<p class="quiet">{escape(text)}</p>'


def flatten(mapping: Mapping[str, Any], prefix: str = "", separator: str = " ") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in mapping.items():
        if isinstance(value, Mapping):
            pairs.extend(flatten(value, f"{prefix}{key}{separator}", separator))
        else:
            pairs.append((f"{prefix}{key}", str(value)))
    return pairs


def _anchor(title: str) -> str:
    return "s-" + re.sub(r"\W+", "-", title.lower()).strip("-")
