"""How fast each stage of a run is: the figures, and the file that gives them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from bbopd.errors import ConfigError

__all__ = ["Rates", "read_rates"]

_MAY_BE_ZERO = ("push", "other")


@dataclass(frozen=True, slots=True)
class Rates:
    """Response tokens a second of all GPUs of a stage together; None: not known. ``push`` and ``other`` are seconds of one cycle."""

    sampling: float | None = None
    """Written by the student."""
    scoring: float | None = None
    """By the teacher, however many machines it has."""
    training: float | None = None
    """Of responses; prompts are read along."""
    push: float = 0.0
    """To give the engine new weights."""
    other: float = 0.0
    """Between the stages."""
    answer_tokens: float | None = None
    """Mean length of an answer; None: as long as it may be. Likewise those of a prompt and of a labelled continuation."""
    prompt_tokens: float | None = None
    reference_tokens: float | None = None
    gpus: int = 1
    """That trained at this rate."""
    engines: int = 1
    """GPUs that sampled at theirs."""
    source: str = "given"

    def on(self, gpus: int, engines: int) -> Rates:
        """Of that many GPUs, each as fast as one of these; the teacher has its own."""
        sampling = None if self.sampling is None else self.sampling * engines / self.engines
        training = None if self.training is None else self.training * gpus / self.gpus
        return replace(self, sampling=sampling, training=training, gpus=gpus, engines=engines)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def read_rates(path: str | Path) -> Rates:
    """A JSON object with fields of `Rates`. Raises `ConfigError` naming what is wrong with it."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the rates in {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    known = {field.name for field in fields(Rates)}
    if not isinstance(found, Mapping) or not set(found) <= known:
        odd = ", ".join(sorted(set(found) - known)) if isinstance(found, Mapping) else type(found).__name__
        raise ConfigError(f"{path} holds {odd}: give one object with some of {', '.join(sorted(known))}")
    for name, value in found.items():
        is_number = isinstance(value, int | float) and (value > 0 or (value == 0 and name in _MAY_BE_ZERO))
        if name != "source" and value is not None and not is_number:
            raise ConfigError(
                f"{path}: {name} is {value!r}: give tokens a second, seconds of a cycle (push, other), tokens, or a count of GPUs"
            )
    return Rates(**{"source": str(path), **found})
