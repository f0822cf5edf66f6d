"""Documents from the places a config can name: the demo text, text files, and tables of rows (see `rows`)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from bbopd.config import PromptSource
from bbopd.data import rows
from bbopd.data.demo_text import demo_chat, demo_topics
from bbopd.data.documents import Document
from bbopd.data.shards import BEGINNING, ShardedRows
from bbopd.errors import DataError

_DOCUMENT_CHARACTERS = 8_000


def read_documents(source: PromptSource, skipped: Counter[str] | None = None) -> Iterator[Document]:
    """Documents of ``source``, at most ``limit``, in a fixed order; ``skipped`` counts rows without text and bad ones.

    Of one that flows, these are the first that `Flow` would shuffle at a time.

    Raises
    ------
    DataError
        Naming the file and line, or the data set, that cannot be used.
    """
    skipped = Counter() if skipped is None else skipped
    if source.demo:
        documents = _demo()
    elif source.jsonl is not None:
        documents = rows.jsonl(source, Path(source.jsonl), skipped)
    elif source.parquet is not None:
        documents = rows.parquet(source, Path(source.parquet), skipped)
    elif source.text is not None:
        documents = _text(Path(source.text))
    else:
        documents = _first_of_dataset(source, skipped)
    return islice(documents, source.limit)


def _first_of_dataset(source: PromptSource, skipped: Counter[str]) -> Iterator[Document]:
    table = ShardedRows(source)
    reader = table.read(range(table.count), BEGINNING)
    try:
        yield from islice(rows.dataset(source, reader, skipped), source.buffer)
    finally:
        reader.close()


def _demo() -> Iterator[Document]:
    for name, text in demo_topics().items():
        yield Document(name=f"pydoc:{name}", where=f"pydoc topic {name}", text=text)
    for name, question in demo_chat().items():
        yield Document(name=f"chat:{name}", where=f"demo chat prompt {name}", messages=(("user", question),))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}): convert it first") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _text(path: Path) -> Iterator[Document]:
    """Every file of a folder is a document; a single file is cut at two blank lines or more or, without any, into runs of paragraphs."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
        for file in files:
            name = file.relative_to(path).as_posix()
            yield from _named([_read(file)], name, str(file))
        return
    text = _read(path)
    pieces = [piece for piece in re.split(r"\n[ \t]*\n[ \t]*\n\s*", text) if piece.strip()]
    yield from _named(pieces if len(pieces) > 1 else _paragraph_runs(text), path.name, str(path))


def _named(pieces: list[str], name: str, where: str) -> Iterator[Document]:
    for index, piece in enumerate(pieces):
        if piece.strip():
            yield Document(name=name if len(pieces) == 1 else f"{name}:{index}", where=where, text=piece.strip())


def _paragraph_runs(text: str) -> list[str]:
    runs: list[str] = []
    for paragraph in re.split(r"\n[ \t]*\n", text):
        if runs and len(runs[-1]) + len(paragraph) <= _DOCUMENT_CHARACTERS:
            runs[-1] += "\n\n" + paragraph
        else:
            runs.append(paragraph)
    return runs
