"""Which rollouts are not worth a teacher's time, and a record of those that were turned away.

Shape: ``L`` response tokens of one rollout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal

from bbopd.config import FiltersConfig
from bbopd.errors import DataError
from bbopd.types import Rollout

Reason = Literal["empty", "too_short", "too_long", "truncated", "repetition", "duplicate"]


class RolloutFilter:
    """Judges rollouts by `FiltersConfig`.

    Two equal answers to one prompt are duplicates within one update cycle: `start_cycle` forgets the answers seen, so that
    nothing outlives a cycle. The token that ends an answer is no part of its length or repetition.

    Parameters
    ----------
    stop_token_ids
        Tokens that end an answer (end of text).
    """

    def __init__(self, config: FiltersConfig, stop_token_ids: Iterable[int]) -> None:
        self._config = config
        self._stop_ids = frozenset(stop_token_ids)
        self._seen: set[tuple[tuple[int, ...], tuple[int, ...]]] = set()

    def start_cycle(self) -> None:
        self._seen.clear()

    def check(self, rollout: Rollout) -> Reason | None:
        """The first reason to reject ``rollout``, in the order of `Reason`, or None."""
        config = self._config
        ids = rollout.token_ids
        if ids and ids[-1] in self._stop_ids:
            ids = ids[:-1]
        if not ids:
            return "empty"
        if len(ids) < config.min_tokens:
            return "too_short"
        if config.max_tokens is not None and len(ids) > config.max_tokens:
            return "too_long"
        if config.reject_truncated and rollout.finish_reason == "length":
            return "truncated"
        if repeated_share(ids, config.repetition_ngram) > config.max_repetition:
            return "repetition"
        if config.reject_duplicates:
            key = (rollout.prompt.token_ids, ids)
            if key in self._seen:
                return "duplicate"
            self._seen.add(key)
        return None


def repeated_share(ids: tuple[int, ...], n: int) -> float:
    """Share of the n-grams of ``ids`` [L] that occurred before in it: 0 where all differ, near 1 for one phrase over and over."""
    total = len(ids) - n + 1
    if total < 1:
        return 0.0
    return 1.0 - len({ids[start : start + n] for start in range(total)}) / total


class RejectedLog:
    """Appends rejected rollouts to a JSONL file, one flushed line each: reason, ids, and text where ``decode`` is given.

    Raises `DataError` where the file cannot be made, and later where the disk does not take a line.
    """

    def __init__(self, path: Path, decode: Callable[[list[int]], str] | None = None) -> None:
        self._path = path
        self._decode = decode
        with self._explained():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def write(self, rollout: Rollout, reason: Reason) -> None:
        line = {
            "rollout_id": rollout.rollout_id,
            "prompt_id": rollout.prompt.prompt_id,
            "reason": reason,
            "finish_reason": rollout.finish_reason,
            "weights_version": rollout.weights_version,
            "prompt_token_ids": list(rollout.prompt.token_ids),
            "token_ids": list(rollout.token_ids),
        }
        if self._decode is not None:
            line |= {"prompt": self._decode(list(rollout.prompt.token_ids)), "response": self._decode(list(rollout.token_ids))}
        with self._explained():
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()

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
