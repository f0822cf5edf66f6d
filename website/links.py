"""Whether a built site holds together: every link leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

_LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}


class _Page(HTMLParser):
    """What one page links to, loads, and can be linked to by."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value for name, value in attrs if value is not None}
        self.anchors.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and "href" in values and not {"canonical", "prev", "next"} & set(values.get("rel", "").split()):
            self.loaded.append(values["href"])
        if tag in _LOADS and _LOADS[tag] in values:
            self.loaded.append(values[_LOADS[tag]])


def broken_links(site: Path) -> list[str]:
    """One line for every link of the pages below ``site`` to a page, file or anchor that is not there, and for all that is loaded from
    another host."""
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        where = path.relative_to(site)
        found += [f"{where}: loads {url} from another host" for url in page.loaded if urlsplit(url).netloc]
        for url in [*page.links, *page.loaded]:
            parts = urlsplit(url)
            if parts.scheme or parts.netloc:
                continue
            target = _file(site, path, unquote(parts.path))
            if target is None:
                found.append(f"{where}: {url} leads nowhere")
            elif parts.fragment and target in pages and unquote(parts.fragment) not in pages[target].anchors:
                found.append(f"{where}: {url} names an anchor that {target.relative_to(site)} does not have")
    return found


def _file(site: Path, page: Path, path: str) -> Path | None:
    """The file behind the path of a link; None where there is none."""
    target = page if not path else (site / path.lstrip("/") if path.startswith("/") else page.parent / path)
    target = Path(target.resolve())
    target = target / "index.html" if target.is_dir() else target
    return target if target.is_file() and target.is_relative_to(site.resolve()) else None
