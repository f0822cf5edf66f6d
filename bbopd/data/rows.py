"""Rows of tables (JSONL lines, Parquet, data sets) as documents: chats, questions, or running text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bbopd.config import PromptSource
from bbopd.data.documents import Document
from bbopd.errors import DataError

_PARQUET_ROWS = 1024
_CHATS = ("messages", "conversations")
_RESPONSES = ("response", "completion")
_ROLES = {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them

Row = tuple[str, str, Any]  # a name, where it is, and what is there


def jsonl(source: PromptSource, path: Path, skipped: Counter[str]) -> Iterator[Document]:
    return _documents(jsonl_rows(path), source, skipped, text_column=None)


def parquet(source: PromptSource, path: Path, skipped: Counter[str]) -> Iterator[Document]:
    """One file, or those of a folder in the order of their names."""
    return _documents(_parquet_rows(source, path), source, skipped, text_column="text")


def dataset(source: PromptSource, found: Iterable[Row], skipped: Counter[str]) -> Iterator[Document]:
    """Rows that were ``found`` in a data set (see `shards`)."""
    return _documents(found, source, skipped, text_column="text")


# ---------------------------------------------------------------- where rows come from


def jsonl_rows(path: Path) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                where = f"{path}:{number}"
                try:
                    line = raw.decode("utf-8")
                    if line.strip():
                        yield f"{path.name}:{number}", where, json.loads(line)
                except UnicodeDecodeError as error:
                    raise DataError(f"{where} is not UTF-8 text (byte {error.start} of the line): convert it first") from error
                except json.JSONDecodeError as error:
                    raise DataError(f"{where}: not JSON ({error.msg} at column {error.colno}); each line must be one object") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _parquet_rows(source: PromptSource, path: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    files = sorted(path.rglob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .parquet file")
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            with ParquetFile(file) as table:
                wanted = _known_columns(source, table.schema_arrow.names)
                number = 0
                for batch in table.iter_batches(_PARQUET_ROWS, columns=wanted):
                    for row in batch.to_pylist():
                        yield f"{name}:{number}", f"{file} row {number}", row
                        number += 1
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"cannot read {file} as Parquet: {str(error).splitlines()[0]}") from error


def _known_columns(source: PromptSource, names: list[str]) -> list[str]:
    """Columns that a document can be made of; all of them where none is known, for the error that names them."""
    known = {source.column, *_RESPONSES} if source.column else {*_CHATS, "prompt", "text", *_RESPONSES}
    chosen = [name for name in names if name in known]
    return names if not set(chosen) - set(_RESPONSES) else chosen


# ---------------------------------------------------------------- what a row says


def _documents(rows: Iterable[Row], source: PromptSource, skipped: Counter[str], text_column: str | None) -> Iterator[Document]:
    for name, where, row in rows:
        try:
            document = _document(row, name, where, source.column, text_column)
        except DataError:
            if source.bad_rows == "error":
                raise
            skipped["bad_row"] += 1
            continue
        if document is None:
            skipped["empty"] += 1
        else:
            yield document


def _document(row: Any, name: str, where: str, column: str | None, text_column: str | None) -> Document | None:
    """A row as a document; None where its text is empty."""
    expected = "an object with either 'prompt' (a string) or 'messages' (a list), and optionally 'response'"
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected {expected}")
    if column is not None and column not in row:
        raise DataError(f"{where}: no column {column!r}; it has {', '.join(sorted(map(str, row)))}: set data.prompts.column")
    chosen = [column] if column is not None else [name for name in (*_CHATS, "prompt") if name in row]
    if not chosen and text_column is not None and text_column in row:
        chosen = [text_column]
    if len(chosen) != 1:
        hint = "" if text_column is None else f", or 'text'; it has {', '.join(sorted(map(str, row)))}: set data.prompts.column"
        raise DataError(f"{where}: expected {expected}{hint}")
    response = _response(row, where)
    key, value = chosen[0], row[chosen[0]]
    if key == "prompt" and isinstance(value, str):
        if not value:
            raise DataError(f"{where}: 'prompt' must be a string that is not empty")
        return Document(name=name, where=where, prompt=value, response=response)
    if key in _CHATS or isinstance(value, list):
        return _chat(value, response, name, where, key)
    if key == "prompt":
        raise DataError(f"{where}: 'prompt' must be a string that is not empty")
    if value is not None and not isinstance(value, str):
        raise DataError(f"{where}: column {key!r} holds {type(value).__name__}, not text")
    return Document(name=name, where=where, text=value.strip()) if value and value.strip() else None


def _response(row: Mapping[str, Any], where: str) -> str | None:
    key = next((name for name in _RESPONSES if row.get(name) is not None), None)
    if key is None:
        return None
    response = row[key]
    if isinstance(response, list) and len(response) == 1 and isinstance(response[0], Mapping):
        response = response[0].get("content")  # a chat's completion, as TRL writes it
    if not isinstance(response, str) or not response:
        raise DataError(f"{where}: {key!r} must be a string that is not empty; leave it out where there is none")
    return response


def _chat(value: Any, response: str | None, name: str, where: str, key: str) -> Document:
    messages = _messages(value, where, key)
    if messages[-1][0] == "assistant" and response is None:
        messages, response = messages[:-1], messages[-1][1]
    if not messages or messages[-1][0] == "assistant" or response == "":
        raise DataError(f"{where}: {key!r} must end with the question, or with one assistant message that answers it")
    return Document(name=name, where=where, messages=messages, response=response)


def _messages(value: Any, where: str, key: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {key!r} must be a list of objects with 'role' and 'content'")
    messages = []
    for message in value:
        pair: tuple[Any, Any] = (None, None)
        if isinstance(message, Mapping):
            role = message.get("role") or message.get("from")
            content = message.get("content") if "content" in message else message.get("value")
            pair = (_ROLES.get(str(role), role), content)
        if not all(isinstance(part, str) for part in pair):
            raise DataError(
                f"{where}: each of {key!r} needs 'role' and 'content' (or 'from' and 'value'), both strings; got {str(message)[:200]}"
            )
        messages.append(pair)
    return tuple(messages)
