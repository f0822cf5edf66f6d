"""The page that people rate answers on: one file, which opens anywhere, fetches nothing and knows no model's name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bbopd.errors import BbopdError, ConfigError
from bbopd.evaluate.human.comparisons import Comparison, key_to_json, page_id

_TEMPLATE = Path(__file__).with_name("page.html")
_PLACE = "__TASK__"


@dataclass(frozen=True, slots=True)
class PageFiles:
    """``page`` is for the people who rate, ``key`` is not."""

    page: Path
    key: Path


def render(comparisons: Sequence[Comparison]) -> str:
    """The whole page. What comes from models stands in one JSON element, in which nothing can end the element."""
    items = [{"id": item.item_id, "prompt": item.prompt, "answers": list(item.answers)} for item in comparisons]
    task = json.dumps({"page": page_id(comparisons), "items": items}, ensure_ascii=False)
    task = task.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    before, after = _TEMPLATE.read_text(encoding="utf-8").split(_PLACE)
    return before + task + after


def check_free(path: str | Path) -> PageFiles:
    """Where page and key will lie. Raises `ConfigError` where either is there already, since ratings of the old page need the old key."""
    page = Path(path)
    files = PageFiles(page, page.with_suffix(".key.json"))
    for file in (files.page, files.key):
        if file.exists():
            raise ConfigError(f"{file} is there already, and ratings may be made with it: set --output to another file, or delete it")
    return files


def write_page(path: str | Path, comparisons: Sequence[Comparison]) -> PageFiles:
    """Write the page to ``path`` and its key beside it. Raises as `check_free`, and `BbopdError` where they cannot be written."""
    files = check_free(path)
    page = files.page
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        files.key.write_text(json.dumps(key_to_json(comparisons), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        page.write_text(render(comparisons), encoding="utf-8")
    except OSError as error:
        raise BbopdError(f"cannot write {error.filename or page}: {error.strerror or error}") from error
    return files
