"""A filter of answers that hold words they must not hold."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from bbopd.types import Rollout


class Banned:
    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

        words: tuple[str, ...]

    def __init__(self, options: Options) -> None:
        self._words = options.words

    def check(self, rollout: Rollout, text: str) -> str | None:
        found = [word for word in self._words if word in text]
        return f"it says {', '.join(found)}" if found else None
