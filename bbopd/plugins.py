"""Plug-ins: parts of a run that other packages bring. They are found by their entry points, and imported where a run names them.

A package registers a class under a name in one of the groups ``bbopd.teachers``, ``bbopd.engines``, ``bbopd.objectives``,
``bbopd.filters`` and ``bbopd.trackers``; docs/plugins.md says what a class of each has. The library's own names cannot be taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal, TypeAlias, get_args

from bbopd.errors import BbopdError, ConfigError
from bbopd.types import Divergence

__all__ = ["GROUPS", "EngineName", "Group", "GroupName", "ObjectiveName", "Plugin", "PluginUse", "TrackerName", "find", "installed"]

GroupName: TypeAlias = Literal["teachers", "engines", "objectives", "filters", "trackers"]
EngineName: TypeAlias = Literal["hf", "vllm"]
ObjectiveName: TypeAlias = Divergence | Literal["aligned", "mixed", "policy_gradient", "sft", "seqkd", "verbal", "gad"]
TrackerName: TypeAlias = Literal["mlflow", "trackio", "wandb"]


@dataclass(frozen=True, slots=True)
class Group:
    """One kind of plug-in."""

    setting: str
    """Where a configuration names it."""
    built_in: tuple[str, ...]
    """Names that are the library's own: choices of the setting, of teachers ways to reach one, of filters reasons to reject."""
    attributes: tuple[str, ...]
    """What a class of it has."""


GROUPS: Mapping[GroupName, Group] = {
    "teachers": Group("teacher.plugin", ("grpc", "openai", "serve", "self"), ("score", "complete")),
    "engines": Group("rollouts.engine", get_args(EngineName), ("generate", "load_weights")),
    "objectives": Group(
        "objective.name",
        tuple(name for part in get_args(ObjectiveName) for name in get_args(part)),
        ("FACTS", "signal", "loss"),
    ),
    "filters": Group(
        "data.filters.plugins",
        (
            *("empty", "too_short", "too_long", "truncated", "no_eos", "repetition", "duplicate"),
            *("charset", "language", "near_duplicate", "bad_update", "stale"),
        ),
        ("check",),
    ),
    "trackers": Group("track", get_args(TrackerName), ("log", "close")),
}


@dataclass(frozen=True, slots=True)
class Plugin:
    """A class that a package registers: ``value`` is where it is, ``module:Class``."""

    group: GroupName
    name: str
    package: str
    version: str
    value: str

    def __str__(self) -> str:
        return f"plug-in {self.name} of {self.package} {self.version}"

    def load(self) -> type:
        """Import the class. Raises `ConfigError` where it cannot be imported, lacks what its group needs, or has a name that is taken."""
        setting = GROUPS[self.group].setting
        if self.name in GROUPS[self.group].built_in:
            raise ConfigError(f"{self} takes a name that is bbopd's own in {setting}, and is never used: its authors have to rename it")
        try:
            found = EntryPoint(self.name, self.value, f"bbopd.{self.group}").load()
        except Exception as error:  # somebody's module raises what it likes
            raise ConfigError(
                f"{self} cannot be imported from {self.value} ({type(error).__name__}: {error}): install {self.package} again, with what "
                f"it needs, or leave {self.name} out of {setting}"
            ) from error
        if not isinstance(found, type):
            raise ConfigError(f"{self} is no class: {self.value} is {found!r}; a plug-in of bbopd.{self.group} is one (docs/plugins.md)")
        self.require(found, GROUPS[self.group].attributes)
        options = getattr(found, "Options", None)
        if options is not None and not _is_model(options):
            raise ConfigError(f"{self}: {self.value}.Options is {options!r}, and no pydantic model: its authors have to mend that")
        return found

    def require(self, found: object, names: Sequence[str]) -> None:
        """Raises `ConfigError` where its class, or an instance of it, has not all of ``names``."""
        missing = [name for name in names if not hasattr(found, name)]
        if missing:
            raise ConfigError(
                f"{self} does not fit: {self.value} has no {' and no '.join(missing)}, as every plug-in of bbopd.{self.group} has "
                f"(docs/plugins.md): take a version of {self.package} that is made for this one of bbopd"
            )

    def options(self, given: Mapping[str, Any], key: str) -> Any:
        """``given`` as its class wants it: an instance of its ``Options``, or the mapping. Raises `ConfigError` by ``key``."""
        model = getattr(self.load(), "Options", None)
        if model is None:
            return dict(given)
        from pydantic import ValidationError

        try:
            return model.model_validate(dict(given))
        except ValidationError as error:
            lines = [f"  {'.'.join([key, *map(str, issue['loc'])])}: {issue['msg']} (got {issue['input']!r})" for issue in error.errors()]
            known = ", ".join(model.model_fields) or "none"
            raise ConfigError(f"{self} does not take these options; it knows {known}:\n" + "\n".join(lines)) from None

    def make(self, *context: Any, options: Any) -> Any:
        """An instance of its class, made of ``context`` and ``options``. Raises `ConfigError`, or what the class itself has to say."""
        kind = self.load()
        try:
            return kind(*context, options)
        except BbopdError:
            raise
        except Exception as error:  # somebody's class raises what it likes
            raise ConfigError(f"{self} cannot be made: {type(error).__name__}: {error}") from error


def _is_model(options: object) -> bool:
    from pydantic import BaseModel

    return isinstance(options, type) and issubclass(options, BaseModel)


@dataclass(frozen=True, slots=True)
class PluginUse:
    """A plug-in as a configuration names it, with ``options`` that stand under ``key``."""

    group: GroupName
    name: str
    options: Mapping[str, Any]
    key: str

    def check(self) -> Plugin:
        """The plug-in, which can be imported and takes its options. Raises `ConfigError`."""
        plugin = find(self.group, self.name)
        plugin.options(self.options, self.key)
        return plugin

    def make(self, *context: Any) -> Any:
        """An instance of it. Raises `ConfigError`."""
        plugin = find(self.group, self.name)
        return plugin.make(*context, options=plugin.options(self.options, self.key))


def installed(group: GroupName) -> list[Plugin]:
    """What the installed packages register in ``group``, by name; nothing of it is imported."""
    found = []
    for point in entry_points(group=f"bbopd.{group}"):
        package, version = ("?", "?") if point.dist is None else (point.dist.name, point.dist.version)
        found.append(Plugin(group, point.name, package, version, point.value))
    return sorted(found, key=lambda plugin: (plugin.name, plugin.package))


def find(group: GroupName, name: str) -> Plugin:
    """The plug-in called ``name``; it is not imported. Raises `ConfigError` where no package registers it, or several do."""
    there = installed(group)
    named = [plugin for plugin in there if plugin.name == name]
    if len(named) == 1:
        return named[0]
    if named:
        packages = " and ".join(f"{plugin.package} {plugin.version}" for plugin in named)
        raise ConfigError(f"{name} is registered in bbopd.{group} by {packages}: uninstall all but one")
    usable = [*(GROUPS[group].built_in if group in ("engines", "objectives", "trackers") else ()), *(plugin.name for plugin in there)]
    near = difflib.get_close_matches(name, usable, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    raise ConfigError(
        f"there is no {name}: {hint}Known here: {', '.join(usable) or 'none'}; a package that brings it registers it in bbopd.{group} "
        "(`bbopd plugins` lists those)"
    )
