"""Libraries of the extras (``bbopd[data]``, ``bbopd[lora]``), loaded where a setting asks for them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from bbopd.errors import ConfigError


def need(module: str, setting: str, *, extra: str = "data") -> Any:
    """Import ``module`` for ``setting``. Raises `ConfigError` with the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ConfigError(
            f"{setting} needs the package {package}: pip install 'bbopd[{extra}]', or leave {setting} out ({error})"
        ) from error
