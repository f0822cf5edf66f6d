"""The public surface, a line for each thing that somebody may rely on. ``python -m tests.public_api`` writes it to ``public_api.txt``."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path

import bbopd
from bbopd import errors
from bbopd.config_eval import MEASURES
from bbopd.objectives import FACTS, Facts, Objective
from bbopd.pipeline.plugged import EngineSetting, TeacherSetting
from bbopd.pipeline.trackers import TrackedRun, Tracker
from bbopd.plugins import GROUPS
from bbopd.trainer.step import StepMetrics
from bbopd.types import (
    Completion,
    Group,
    Judge,
    Offer,
    Prompt,
    Reward,
    Rollout,
    RolloutEngine,
    Sampling,
    ScoredRollout,
    SignalSpec,
    Teacher,
    TeacherInfo,
    TeacherSignal,
    Unscored,
)
from website.commands import arguments_of, parsers
from website.options import FILES, default_in_words, options_of, sections_of, type_in_words

FILE = Path(__file__).with_name("public_api.txt")

_NOUNS = (
    *(Completion, Group, Offer, Prompt, Reward, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo, TeacherSignal, Unscored),
    *(Facts, EngineSetting, TeacherSetting, TrackedRun),
)
_PROTOCOLS = (Teacher, Judge, RolloutEngine, Objective, Tracker)


def lines() -> Iterator[str]:
    """Of the Python names, what plug-ins meet, options, commands, metrics and exit statuses."""
    for name in bbopd.__all__:
        if name != "__version__":
            yield from _python(f"bbopd.{name}", getattr(bbopd, name))
    for noun in _NOUNS:
        yield from _python(f"{noun.__module__}.{noun.__name__}", noun)
    for protocol in _PROTOCOLS:
        for name, member in vars(protocol).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                yield f"python {protocol.__module__}.{protocol.__name__}.{name}{inspect.signature(member)}"
            elif isinstance(member, property):
                yield f"python {protocol.__module__}.{protocol.__name__}.{name}"
    for group, about in GROUPS.items():
        yield f"plug-in bbopd.{group} [{about.setting}] has {', '.join(about.attributes)}"
    for file in FILES:
        for key, model in sections_of(file.model):
            for option in options_of(model):
                path = f"{key}.{option.name}" if key else option.name
                yield f"option {file.page}: {path}: {type_in_words(option.field, {})}, {default_in_words(option.field)}"
    for name, parser in parsers():
        yield f"command {name}"
        for argument in arguments_of(parser):
            yield f"command {name} {_argument(argument)}"
    for name in FACTS:
        yield f"objective {name}"
    for name in MEASURES:
        yield f"measure {name}"
    for field in dataclasses.fields(StepMetrics):
        yield f"metric of a step: {field.name}"
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.BbopdError):
            yield f"exit status {kind.exit_code}: {kind.__name__}"


def _python(name: str, thing: object) -> Iterator[str]:
    if dataclasses.is_dataclass(thing):
        yield f"python {name}"
        for field in dataclasses.fields(thing):
            is_given = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
            yield f"python {name}.{field.name}: {field.type}{'' if is_given else ' = a default'}"
    else:
        assert callable(thing)
        yield f"python {name}{inspect.signature(thing)}"


def _argument(argument: argparse.Action) -> str:
    shown = "/".join(argument.option_strings) or argument.dest
    takes = "" if argument.nargs == 0 else f" nargs={argument.nargs}" if argument.nargs is not None else " value"
    choices = "" if argument.choices is None else f" of {', '.join(map(str, argument.choices))}"
    return f"{shown}{takes}{choices}"


if __name__ == "__main__":
    FILE.write_text("".join(f"{line}\n" for line in lines()), encoding="utf-8")
