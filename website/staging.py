"""The sources of the site, put together: pages of ``docs/``, files of the project that they link to, and what the code says of itself."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from website import commands, options, python_api

_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?(?=\))")
_FENCE = re.compile(r"^\s*(```|~~~)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".proto": "protobuf", ".json": "json", ".csv": "text", ".toml": "toml"}
_DRAWN = (".svg", ".png")
_PAGES_BESIDE = ("CHANGELOG.md", "CONTRIBUTING.md")  # pages of the project that do not lie in docs/


def stage(project: Path, target: Path) -> None:
    """Write the sources of the site into the folder ``target``, which is emptied first.

    Links out of ``docs/`` are followed: a page, a source file or a folder of the project becomes a page of the site below ``files/``.

    Raises
    ------
    ValueError
        A link to a file that is not there, with the page that has it.
    """
    shutil.rmtree(target, ignore_errors=True)
    _Staging(project, target).run()
    for folder, pages in generated_pages().items():
        for name, text in pages.items():
            _write(target / folder / f"{name}.md", text)
    for name in ("extra.css", "icon.svg"):
        shutil.copy(Path(__file__).parent / name, target / name)


def generated_pages() -> dict[str, dict[str, str]]:
    """The pages that the code writes of itself: folder, name, Markdown."""
    return {
        "reference": {"commands": commands.commands_page()},
        "reference/options": {file.page: options.options_page(file) for file in options.FILES},
        "reference/python": {page.page: python_api.api_page(page) for page in python_api.PAGES},
    }


class _Staging:
    def __init__(self, project: Path, target: Path) -> None:
        self.project, self.target = project.resolve(), target
        self.docs = self.project / "docs"
        self.done: set[Path] = set()

    def run(self) -> None:
        sources = [path for path in sorted(self.docs.rglob("*")) if path.is_file()]
        for source in [*sources, *(self.project / name for name in _PAGES_BESIDE)]:
            self._take(source)

    def _take(self, source: Path) -> None:
        """Make a page of a file or folder, and of all that it links to."""
        if source in self.done:
            return
        self.done.add(source)
        target = self.target / self._page(source)
        if source.is_dir():
            entries = [
                path for path in sorted(source.rglob("*")) if path.is_file() and path.suffix in (".md", ".ipynb", *_DRAWN, *_LANGUAGES)
            ]
            lines = [f"- [{path.relative_to(source)}]({self._link(path, source)})" for path in entries]
            _write(target, "\n".join([f"# {source.relative_to(self.project)}", "", *lines, ""]))
        elif source.suffix == ".md":
            _write(target, "".join(self._rewritten(source)))
        elif source.suffix == ".ipynb":
            _write(target, _notebook(json.loads(source.read_text(encoding="utf-8"))))
        elif source.suffix in _LANGUAGES:
            text = source.read_text(encoding="utf-8").rstrip()
            fence = f"``` {_LANGUAGES[source.suffix]}"
            _write(target, f"# {source.relative_to(self.project)}\n\n{fence}\n{text}\n```\n")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)

    def _page(self, source: Path) -> Path:
        """Where a file of the project lies among the sources of the site."""
        if source.is_relative_to(self.docs) and source.suffix in (".md", *_DRAWN):
            return source.relative_to(self.docs)
        path = source.relative_to(self.project)
        if str(path) in _PAGES_BESIDE:
            return Path(path.name.lower())
        return Path("files") / (path if source.suffix in (".md", *_DRAWN) else path.with_name(path.name.replace(".", "_") + ".md"))

    def _rewritten(self, source: Path) -> Iterator[str]:
        """The lines of a page, with its links as they are in the site."""
        is_code = False
        for number, line in enumerate(source.read_text(encoding="utf-8").splitlines(keepends=True), 1):
            is_code ^= bool(_FENCE.match(line))
            try:
                yield line if is_code else _LINK.sub(lambda match: self._link_text(match, source), line)
            except FileNotFoundError as error:
                raise ValueError(f"{source.relative_to(self.project)}:{number}: the link to {error.args[0]} leads nowhere") from None

    def _link_text(self, match: re.Match[str], source: Path) -> str:
        linked = Path(os.path.normpath(source.parent / match[1]))
        if not linked.exists() or not linked.is_relative_to(self.project):
            raise FileNotFoundError(match[1])
        return self._link(linked, source) + (match[2] or "")

    def _link(self, linked: Path, source: Path) -> str:
        self._take(linked)
        return os.path.relpath(self._page(linked), self._page(source).parent)


def _notebook(content: Mapping[str, Any]) -> str:
    """A notebook as a page: its text, and its code in blocks."""
    parts = []
    for cell in content["cells"]:
        text = "".join(cell["source"]).rstrip()
        parts.append(text if cell["cell_type"] == "markdown" else f"``` python\n{text}\n```")
    return "\n\n".join(parts) + "\n"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
