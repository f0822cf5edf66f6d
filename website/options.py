"""Pages of every option that a YAML file may hold: its key, type, default and meaning, read from the models themselves."""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

import annotated_types
from pydantic.fields import FieldInfo

from bbopd.config import RunConfig, SampleServerConfig, ServeConfig
from bbopd.config_base import Section
from bbopd.config_compare import CompareConfig
from bbopd.config_task import TaskConfig

_LIMITS = (
    (annotated_types.Gt, "gt", ">"),
    (annotated_types.Ge, "ge", "≥"),
    (annotated_types.Lt, "lt", "<"),
    (annotated_types.Le, "le", "≤"),
)
_WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", Any: "any value", type(None): "none"}


class OptionsFile(NamedTuple):
    """A kind of YAML file: the page about it, its title, what reads it, and its model."""

    page: str
    title: str
    about: str
    model: type[Section]


FILES = (
    OptionsFile(
        "run", "A run", "`bbopd distill`, `plan` and `doctor` read it, and `--set section.key=value` lays one value over it.", RunConfig
    ),
    OptionsFile("serve", "A teacher's server", "The file of `bbopd serve`, and `teacher.serve` of a run.", ServeConfig),
    OptionsFile("sample_server", "A sampling server", "The file of `bbopd sample-server`.", SampleServerConfig),
    OptionsFile("compare", "A comparison", "The file of `bbopd compare`.", CompareConfig),
    OptionsFile("task", "A task", "A task of `bbopd eval --tasks`, or of `eval.tasks` in a run.", TaskConfig),
)


class Option(NamedTuple):
    """One key of a section: its name, its field, and its meaning ("" where nobody wrote one)."""

    name: str
    field: FieldInfo
    meaning: str


def options_of(model: type[Section]) -> list[Option]:
    """The options of a section in their order, each with the docstring that follows it in the source."""
    meanings: dict[str, str] = {}
    for kind in reversed(model.__mro__):
        if issubclass(kind, Section):
            meanings |= _docstrings(kind)
    return [Option(name, field, meanings.get(name, "")) for name, field in model.model_fields.items()]


def sections_of(model: type[Section], key: str = "") -> Iterator[tuple[str, type[Section]]]:
    """(key, model) of a section and of all below it, every model once, under the key where it is met first."""
    seen: set[type[Section]] = set()

    def below(model: type[Section], key: str) -> Iterator[tuple[str, type[Section]]]:
        seen.add(model)
        yield key, model
        for name, field in model.model_fields.items():
            for child in _sections_in(field.annotation):
                if child not in seen:
                    yield from below(child, _place(key, name, field.annotation))

    yield from below(model, key)


def options_page(file: OptionsFile) -> str:
    """The page of one kind of file, in Markdown."""
    places: dict[type[Section], str] = {}
    parents: dict[str, Option] = {}
    for key, model in sections_of(file.model):
        places[model] = key
        for option in options_of(model):
            parents[_place(key, option.name, option.field.annotation)] = option
    lines = [f"# {file.title}", "", file.about, ""]
    for key, model in sections_of(file.model):
        if key:
            parent, about = parents[key], as_markdown(inspect.getdoc(model) or "")
            lines += [f"## `{key}` {{ #{_anchor(key)} }}", "", _is_optional(parent.field), ""]
            lines += [parent.meaning and as_markdown(parent.meaning), ""] if parent.meaning.rstrip(".") not in about else []
            lines += [about, ""]
        for option in options_of(model):
            path = _place(key, option.name, option.field.annotation)
            if path not in places.values():
                lines += [f"### `{path}` {{ #{_anchor(path)} }}", ""]
                lines += [f"{type_in_words(option.field, places)} · {default_in_words(option.field)}", "", as_markdown(option.meaning), ""]
    return "\n".join(lines)


def type_in_words(field: FieldInfo, places: Mapping[type[Section], str]) -> str:
    """What a value may be, for someone who does not read Python; sections are links to their ``places`` on the page."""
    return _words(field.annotation, tuple(field.metadata), places)


def default_in_words(field: FieldInfo) -> str:
    if field.is_required():
        return "**has to be given**"
    default = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(default, Section):
        given = default.model_dump(mode="json", exclude_unset=True)
        return f"by default `{json.dumps(given)}`" if given else "its own defaults"
    if default is None:
        return "by default none"
    if isinstance(default, tuple) and any(isinstance(item, Section) for item in default):
        default = [item.model_dump(mode="json", exclude_unset=True) for item in default]
    text = json.dumps(default, ensure_ascii=False) if not isinstance(default, str) else default
    if "\n" in text or not text:
        return "by default a text of its own" if text else "by default empty"
    return f"by default `{text}`"


def _is_optional(field: FieldInfo) -> str:
    """Of a whole section, whether it has to be there."""
    return f"Section · {default_in_words(field)}"


def as_markdown(docstring: str) -> str:
    """A docstring's double backticks as Markdown's single ones; single ones name code too."""
    return inspect.cleandoc(docstring).replace("``", "`")


def _docstrings(model: type[Section]) -> dict[str, str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(model))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for statement, following in zip(tree.body, tree.body[1:], strict=False):
        match statement, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [child for part in get_args(annotation) if not isinstance(part, str) for child in _sections_in(part)]


def _place(key: str, name: str, annotation: Any) -> str:
    """``teachers.NAME``, ``prompts[]``: where a section stands that there may be several of."""
    path = f"{key}.{name}" if key else name
    kinds = [get_origin(part) or part for part in (annotation, *get_args(annotation))]
    if not _sections_in(annotation):
        return path
    return f"{path}.NAME" if Mapping in kinds else f"{path}[]" if tuple in kinds else path


def _anchor(key: str) -> str:
    return re.sub(r"\W|_", "-", key.replace("[]", "")).lower()


def _words(annotation: Any, limits: tuple[Any, ...], places: Mapping[type[Section], str]) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        found = [limit for item in parts[1:] for limit in (item.metadata if isinstance(item, FieldInfo) else [item])]
        return _words(parts[0], (*limits, *found), places)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_words(part, limits if part is not type(None) else (), places) for part in parts))
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        if len(parts) == 2 and parts[1] is Ellipsis:
            return f"list of {_words(parts[0], (), places)}"
        return "[" + ", ".join(_words(part, (), places) for part in parts) + "]"
    if origin is Mapping:
        return f"by name: {_words(parts[1], (), places)}"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        key = places.get(annotation, "")
        return f"[section](#{_anchor(key)})" if key else "section"
    bounds = [f"{sign} {getattr(limit, name):g}" for limit in limits for kind, name, sign in _LIMITS if isinstance(limit, kind)]
    return " ".join([_WORDS.get(annotation, "text"), ", ".join(bounds)]).strip()


if __name__ == "__main__":
    sys.stdout.write("\n".join(options_page(file) for file in FILES))
