"""Rows of a task's data, and the templates that turn one into a prompt, choices and an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from bbopd.errors import ConfigError, DataError

_ENVIRONMENT = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
_NAME = re.compile(r"[^\W\d]\w*")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a task's data: ``name`` in results, ``where`` in errors."""

    name: str
    where: str
    fields: Mapping[str, Any]

    def get(self, field: str, key: str) -> Any:
        """The value of ``field``, which the task's ``key`` asks for. Raises `DataError` where it is not there."""
        if field not in self.fields:
            raise DataError(f"{self.where}: {key} needs a field {field!r}, and this row has {', '.join(sorted(self.fields)) or 'none'}")
        return self.fields[field]


class Template:
    """Jinja over the fields of a row, sandboxed; or, unless ``is_text``, the bare name of a field. ``key`` is what errors call it.

    Raises `ConfigError` for text that is no template.
    """

    def __init__(self, text: str, key: str, *, is_text: bool = False) -> None:
        self._text, self._key = text, key
        self._field = text if not is_text and _NAME.fullmatch(text) else None
        try:
            self._template = _ENVIRONMENT.from_string(text)
        except TemplateError as error:
            raise ConfigError(f"{key} {text!r} is no template: {error}") from None

    def value(self, row: Row) -> Any:
        """The field's own value, or the template's text. Raises `DataError` naming the row."""
        return self.text(row) if self._field is None else row.get(self._field, self._key)

    def text(self, row: Row) -> str:
        """As text, of a bare name too. Raises `DataError` naming the row."""
        if self._field is not None:
            value = row.get(self._field, self._key)
            if not isinstance(value, str | int | float):
                raise DataError(f"{row.where}: {self._key} needs text, and field {self._field!r} holds {type(value).__name__}")
            return str(value)
        try:
            return self._template.render(row.fields)
        except Exception as error:  # a template raises whatever its expressions do
            known = ", ".join(sorted(row.fields)) or "none"
            raise DataError(f"{row.where}: {self._key} {self._text!r} cannot be filled in ({error}); fields of this row: {known}") from None

    def texts(self, row: Row) -> list[str]:
        """A field that lists texts, or a single text. Raises `DataError` where it is neither."""
        value = self.value(row)
        if isinstance(value, str | int | float):
            return [str(value)]
        if isinstance(value, Sequence) and value and all(isinstance(text, str | int | float) for text in value):
            return [str(text) for text in value]
        raise DataError(f"{row.where}: {self._key} needs text or a list of texts, not {str(value)[:100]!r}")


def unique_clusters(template: str | None, rows: Sequence[Row]) -> tuple[str, ...]:
    """What each row belongs to; empty where no template says so."""
    if template is None:
        return ()
    cluster = Template(template, "cluster")
    return tuple(cluster.text(row) for row in rows)
