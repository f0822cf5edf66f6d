"""Somebody's own filter or score: a Python function named in the configuration.

It runs inside the run, with all that the run may do: a configuration that names a hook is trusted code, like the hook itself.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from bbopd.data.rejected import Rejection
from bbopd.errors import ConfigError, DataError
from bbopd.types import Prompt, Rollout


def load_hook(name: str) -> Callable[[Rollout, str], Rejection | None]:
    """The filter behind ``module:function`` or ``path.py:function``, counted as ``hook:function``.

    ``function(rollout, text)`` gets a `Rollout` and its response as text, and returns None to accept it, or why not, in words.

    Raises
    ------
    ConfigError
        Where there is no such function.
    DataError
        From the returned filter, where the function raises, or returns neither None nor text.
    """
    function, attribute = _function(name, "data.filters.hooks")
    return in_words(function, f"hook:{attribute}", f"the hook {name}")


def in_words(function: Callable[[Rollout, str], str | None], reason: str, called: str) -> Callable[[Rollout, str], Rejection | None]:
    """A filter that says in words why it rejects, counted under ``reason``. It raises `DataError`, in which it is ``called`` that."""

    def check(rollout: Rollout, text: str) -> Rejection | None:
        try:
            answer = function(rollout, text)
        except Exception as error:
            raise DataError(f"{called} failed on rollout {rollout.rollout_id}: {type(error).__name__}: {error}") from error
        if answer is None:
            return None
        if not isinstance(answer, str):
            raise DataError(f"{called} returned {answer!r} for rollout {rollout.rollout_id}: None accepts it, text says why not")
        return Rejection(reason, detail=answer)

    return check


def load_score(name: str, option: str) -> Callable[[Prompt, str], float | None]:
    """The score behind ``module:function`` or ``path.py:function``, named by ``option``.

    ``function(prompt, text)`` gets a `Prompt` and an answer to it as text, and returns a number, the better the higher, or None for an
    answer that will not do.

    Raises
    ------
    ConfigError
        Where there is no such function.
    DataError
        From the returned score, where the function raises, or returns neither None nor a finite number.
    """
    function, _ = _function(name, option)

    def score(prompt: Prompt, text: str) -> float | None:
        try:
            answer = function(prompt, text)
        except Exception as error:
            raise DataError(f"{option} {name} failed on an answer to prompt {prompt.prompt_id}: {type(error).__name__}: {error}") from error
        if answer is None:
            return None
        if isinstance(answer, bool) or not isinstance(answer, int | float) or not math.isfinite(answer):
            raise DataError(f"{option} {name} returned {answer!r} for an answer to prompt {prompt.prompt_id}: expected a number, or None")
        return float(answer)

    return score


def _function(name: str, option: str) -> tuple[Callable[..., Any], str]:
    where, _, attribute = name.rpartition(":")
    function = getattr(_module(where, name, option), attribute, None)
    if not callable(function):
        raise ConfigError(f"{option}: {name!r} names no function: there is no {attribute!r} in {where}")
    return function, attribute


def _module(where: str, name: str, option: str) -> Any:
    if not where:
        raise ConfigError(f"{option}: {name!r} is neither module:function nor path.py:function")
    try:
        if not where.endswith(".py"):
            return import_module(where)
        path = Path(where).resolve()
        spec = spec_from_file_location(f"bbopd_hook_{path.stem}", path)
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses and pickles look their module up
        spec.loader.exec_module(module)
        return module
    except Exception as error:  # somebody's module raises what it likes
        raise ConfigError(f"{option}: {where} cannot be imported: {type(error).__name__}: {error}") from error
