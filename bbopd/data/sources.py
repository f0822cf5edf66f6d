"""Documents from the places a config can name: the demo text, JSONL, text files, and data sets streamed from the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from bbopd.config import PromptSource
from bbopd.data.demo_text import demo_chat, demo_topics
from bbopd.errors import DataError

_STREAMED_DOCUMENTS = 20_000
_SHUFFLE_BUFFER = 10_000
_DOCUMENT_CHARACTERS = 8_000


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of text, the unit that is either trained on or held out.

    ``text`` alone is running text, to be cut into prefixes and continuations. ``prompt`` (raw text) or ``messages`` (for the chat
    template) is a question, with its ``response`` where one is known. ``where`` is for error messages.
    """

    name: str
    where: str
    text: str | None = None
    prompt: str | None = None
    messages: tuple[tuple[str, str], ...] | None = None
    response: str | None = None

    @property
    def content(self) -> str:
        """All of it, as one string that does not depend on where it was found."""
        return json.dumps([self.text, self.prompt, self.messages, self.response], ensure_ascii=False)


def read_documents(source: PromptSource, seed: int) -> Iterator[Document]:
    """Documents of ``source``, at most ``limit``, in a fixed order.

    Raises
    ------
    DataError
        Naming the file and line, or the data set, that cannot be used.
    """
    if source.demo:
        documents = _demo()
    elif source.jsonl is not None:
        documents = _jsonl(Path(source.jsonl))
    elif source.text is not None:
        documents = _text(Path(source.text))
    else:
        documents = _dataset(source, seed)
    return islice(documents, source.limit)


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


# ---------------------------------------------------------------- JSONL


def _jsonl(path: Path) -> Iterator[Document]:
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one object") from error
        yield _record(record, f"{path.name}:{number}", where)


def _record(record: Any, name: str, where: str) -> Document:
    if not isinstance(record, dict) or ("prompt" in record) == ("messages" in record):
        raise DataError(f"{where}: expected an object with either 'prompt' (a string) or 'messages' (a list), and optionally 'response'")
    response = record.get("response")
    if response is not None and (not isinstance(response, str) or not response):
        raise DataError(f"{where}: 'response' must be a string that is not empty; leave it out where there is none")
    if "prompt" in record:
        if not isinstance(record["prompt"], str) or not record["prompt"]:
            raise DataError(f"{where}: 'prompt' must be a string that is not empty")
        return Document(name=name, where=where, prompt=record["prompt"], response=response)
    messages = _messages(record["messages"], where)
    if messages[-1][0] == "assistant" and response is None:
        messages, response = messages[:-1], messages[-1][1]
    if not messages or messages[-1][0] == "assistant" or response == "":
        raise DataError(f"{where}: 'messages' must end with the question, or with one assistant message that answers it")
    return Document(name=name, where=where, messages=messages, response=response)


def _messages(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: 'messages' must be a list of objects with 'role' and 'content'")
    for message in value:
        if not isinstance(message, dict) or not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise DataError(f"{where}: each of 'messages' needs 'role' and 'content', both strings; got {message!r}")
    return tuple((message["role"], message["content"]) for message in value)


# ---------------------------------------------------------------- text files


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


# ---------------------------------------------------------------- data sets


def _dataset(source: PromptSource, seed: int) -> Iterator[Document]:
    """Rows of a streamed data set, shuffled through a buffer; 20,000 of them unless ``limit`` says otherwise."""
    import datasets

    label = f"dataset {source.dataset}" + (f" ({source.subset})" if source.subset else "")
    limit = source.limit or _STREAMED_DOCUMENTS
    try:
        stream = datasets.load_dataset(source.dataset, source.subset, split=source.split, streaming=True)
        rows = stream.shuffle(seed=seed % 2**64, buffer_size=min(limit, _SHUFFLE_BUFFER)).take(limit)
        for index, row in enumerate(rows):
            if source.column not in row:
                raise DataError(f"{label} has no column {source.column!r}; it has {', '.join(sorted(row))}: set data.prompts.column")
            text = row[source.column]
            if not isinstance(text, str):
                raise DataError(f"{label}: column {source.column!r} of row {index} holds {type(text).__name__}, not text")
            if text.strip():
                yield Document(name=f"{source.dataset}:{index}", where=f"{label} row {index}", text=text.strip())
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"{label} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}. "
            "Check its name, subset, split and the network, or use a local file (jsonl, text)"
        ) from error
