"""What is kept of a rollout that was turned away: enough for a person to see why."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bbopd.errors import DataError
from bbopd.types import Rollout


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why a rollout is turned away.

    ``reason`` names the filter and is what is counted; ``figure`` is what was measured and ``limit`` what was allowed, in the filter's own
    unit; ``detail`` is for a person (the language that was found, what a hook said).
    """

    reason: str
    figure: float | None = None
    limit: float | None = None
    detail: str = ""


class RejectedLog:
    """Appends rejected rollouts to a JSONL file, one flushed line each: reason, figure, limit, ids, and text where ``decode`` is given.

    The file grows to ``max_bytes`` and no further: a line that would not fit is replaced by one with the reason ``full``, and nothing
    follows it. The counters, which are kept elsewhere, go on.

    Raises `DataError` where the file cannot be made, and later where the disk does not take a line.
    """

    def __init__(self, path: Path, decode: Callable[[list[int]], str] | None = None, max_bytes: int | None = None) -> None:
        self._path = path
        self._decode = decode
        self._max_bytes = max_bytes
        self._is_full = False
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")
            self._size = self._file.tell()

    def write(self, rollout: Rollout, rejection: Rejection) -> None:
        if self._is_full:
            return
        line: dict[str, Any] = {
            "rollout_id": rollout.rollout_id,
            "prompt_id": rollout.prompt.prompt_id,
            "reason": rejection.reason,
            "figure": rejection.figure,
            "limit": rejection.limit,
            "detail": rejection.detail,
            "finish_reason": rollout.finish_reason,
            "weights_version": rollout.weights_version,
            "prompt_token_ids": list(rollout.prompt.token_ids),
            "token_ids": list(rollout.token_ids),
        }
        if self._decode is not None:
            line |= {"prompt": self._decode(list(rollout.prompt.token_ids)), "response": self._decode(list(rollout.token_ids))}
        text = _as_line(line)
        if self._max_bytes is not None and self._size + len(text.encode()) > self._max_bytes:
            self._is_full = True
            text = _as_line(
                {"reason": "full", "figure": self._size, "limit": self._max_bytes, "weights_version": rollout.weights_version}
                | {"detail": "raise data.filters.quarantine_bytes to keep more"}
            )
        with self._explained():
            self._file.write(text)
            self._file.flush()
        self._size += len(text.encode())

    def close(self) -> None:
        with self._explained():
            self._file.close()

    def __enter__(self) -> RejectedLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"cannot write rejected rollouts to {self._path}: {error.strerror}; free some space there, or set output to a folder "
                "that can be written"
            ) from error


def _as_line(content: dict[str, Any]) -> str:
    return json.dumps(content, ensure_ascii=False) + "\n"
