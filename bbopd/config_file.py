"""Reading a configuration: YAML, then ``--set a.b=c`` laid over it, then strict validation with the nearest key named."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from bbopd.config import RunConfig
from bbopd.errors import ConfigError

Model = TypeVar("Model", bound=BaseModel)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file and lay ``--set a.b=c`` over it. Raises `ConfigError` naming the key, the value and the way out."""
    return parse_config(read_yaml(path), overrides, RunConfig, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}, not a mapping of sections")
    return data


def parse_config(data: dict[str, Any], overrides: Sequence[str], model: type[Model], where: str) -> Model:
    for text in overrides:
        data = _with_override(data, text)
    _check_keys(data, model, "")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        lines = []
        for issue in error.errors():
            key = ".".join(str(part) for part in issue["loc"]) or "the whole"
            given = issue["input"]
            shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
            lines.append(f"  {key}: {issue['msg'].removeprefix('Value error, ')}{shown}")
        raise ConfigError(f"{where} cannot run:\n" + "\n".join(lines)) from None


def _with_override(data: dict[str, Any], text: str) -> dict[str, Any]:
    """A copy of ``data`` with one ``a.b=value`` laid over it; the value is read as YAML."""
    key, equals, raw = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {text!r}: write it as section.key=value")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {text!r}: the value is not YAML: {error}") from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-4 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    return with_value(data, key, value, f"--set {text!r}")


def with_value(data: Mapping[str, Any], key: str, value: Any, where: str) -> dict[str, Any]:
    """A copy of ``data`` in which ``key``, ``section.key`` say, is ``value``. Raises `ConfigError` for a key of what is no section."""
    first, _, rest = key.partition(".")
    if not rest:
        return {**data, first: value}
    child = data.get(first) or {}
    if not isinstance(child, Mapping):
        raise ConfigError(f"{where}: {first} is {child!r}, not a section")
    return {**data, first: with_value(child, rest, value, where)}


def _check_keys(data: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    """Name every unknown key together with the nearest known one."""
    names = list(model.model_fields)
    for key, value in data.items():
        path = f"{prefix}{key}"
        if key not in names:
            shown = f" (value {value!r})" if not isinstance(value, dict | list) else ""
            nearest = difflib.get_close_matches(str(key), names, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{nearest[0]}?" if nearest else f"known here: {', '.join(sorted(names))}"
            raise ConfigError(f"unknown key {path}{shown}: {hint}")
        child = _section_of(model, str(key))
        if child is not None and isinstance(value, Mapping) and get_origin(model.model_fields[key].annotation) is Mapping:
            for name, item in value.items():
                if isinstance(item, Mapping):
                    _check_keys(item, child, f"{path}.{name}.")
        elif child is not None and isinstance(value, Mapping):
            _check_keys(value, child, f"{path}.")
        elif child is not None and isinstance(value, list):
            for item in value:
                if isinstance(item, Mapping):
                    _check_keys(item, child, f"{path}.")


def _section_of(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The section model behind a field, looking through ``X | None``, ``tuple[X, ...]`` and ``Mapping[str, X]``."""
    annotation = model.model_fields[name].annotation
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)), None)
