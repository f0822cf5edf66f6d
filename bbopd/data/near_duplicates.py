"""Texts that are nearly the same, by MinHash (Broder 1997) over runs of characters; the signatures and their index are rensa's."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bbopd.data.rejected import Rejection
from bbopd.errors import DataError
from bbopd.extras import need
from bbopd.types import Rollout

_SHINGLE = 8  # characters; any language has them
_PERMUTATIONS = 128  # standard error of the similarity: at most 1 / (2 sqrt 128) = 0.044
_SEED = 0
_SHORTEST_ANSWER = 40  # characters: "Yes." is no copy of another question's "Yes."


class NearDuplicates:
    """The last ``keep`` texts (all of them for None), and whether another is as similar as ``threshold`` to one of them.

    Similarity is the estimated Jaccard index of their sets of 8-character runs, without case and with single spaces. A text takes about
    1.5 KB, whatever its length.
    """

    def __init__(self, threshold: float, keep: int | None, setting: str) -> None:
        self._rensa = need("rensa", setting)
        bands = 64 if threshold < 0.6 else 32  # P(a pair at the threshold shares no band) < 1e-6, and candidates are then compared
        self._index = self._rensa.RMinHashDeduplicator(threshold, _PERMUTATIONS, True, bands, _SEED)
        self._keep = keep
        self._keys: deque[str] = deque()
        self._signatures: dict[str, object] = {}

    def find(self, text: str) -> tuple[str, float] | None:
        """The key of the most similar text and its similarity, where that reaches the threshold."""
        signature = self._signature(text)
        found = [(self._signatures[key].jaccard(signature), key) for key in self._index.get_duplicates(signature)]  # type: ignore[attr-defined]
        if not found:
            return None
        similarity, key = max(found)
        return key, similarity

    def add(self, key: str, text: str) -> None:
        """Remember ``text``, which `find` has not found, as ``key``, and forget the oldest where there are too many."""
        signature = self._signature(text)
        if key in self._signatures or not self._index.add(key, signature):
            return
        self._keys.append(key)
        self._signatures[key] = signature
        if self._keep is not None and len(self._keys) > self._keep:
            oldest = self._keys.popleft()
            self._index.remove(oldest)
            del self._signatures[oldest]

    def _signature(self, text: str) -> object:
        plain = re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip()
        signature = self._rensa.RMinHash(_PERMUTATIONS, _SEED)
        signature.update([plain[start : start + _SHINGLE] for start in range(max(1, len(plain) - _SHINGLE + 1))])
        return signature


class AcceptedAnswers:
    """Answers that have passed the filters, among which near-duplicates of a new one are sought.

    Their text is kept in a JSONL file by ``weights_version``, so that a resumed run, which has dropped the lines of updates that it makes
    again, knows those before them. ``pending`` are the prompts, as often as they are, that it answers again: their last answers are
    forgotten, or the new ones would be copies of them.

    Raises `DataError` where the file cannot be read or written.
    """

    def __init__(self, path: Path, threshold: float, keep: int, pending: Iterable[str] = ()) -> None:
        self._texts = NearDuplicates(threshold, keep, "data.filters.near_duplicates")
        self._path, self._threshold = path, threshold
        self._count = 0
        try:
            lines = _without(_last_lines(path, keep), Counter(pending))
            path.write_text("".join(lines), encoding="utf-8")  # what is too old to be kept goes
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            raise DataError(
                f"cannot use {path}: {error.strerror}; free some space there, or leave data.filters.near_duplicates out"
            ) from error
        for line in lines:
            record = json.loads(line)
            self._remember(record["rollout_id"], record["text"])

    def check_and_add(self, rollout: Rollout, text: str) -> Rejection | None:
        """Reject ``rollout`` for the accepted answer that it nearly repeats, or remember it. Short answers are left alone."""
        if len(text.strip()) < _SHORTEST_ANSWER:
            return None
        found = self._texts.find(text)
        if found is not None:
            key, similarity = found
            return Rejection("near_duplicate", round(similarity, 4), self._threshold, detail=f"of {key.partition(' ')[2]}")
        line = {
            "rollout_id": rollout.rollout_id,
            "prompt_id": rollout.prompt.prompt_id,
            "weights_version": rollout.weights_version,
            "text": text,
        }
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise DataError(f"cannot write {self._path}: {error.strerror}; free some space there") from error
        self._remember(rollout.rollout_id, text)
        return None

    def _remember(self, rollout_id: str, text: str) -> None:
        self._texts.add(f"{self._count} {rollout_id}", text)  # ids come again in every cycle
        self._count += 1

    def close(self) -> None:
        self._file.close()


def _last_lines(path: Path, count: int) -> Sequence[str]:
    if not path.exists():
        return ()

    def whole() -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from (line for line in file if line.endswith("\n"))  # a kill may have cut the last one

    return deque(whole(), maxlen=count)


def _without(lines: Sequence[str], pending: Counter[str]) -> list[str]:
    """``lines`` without the last ones of each prompt, as many as ``pending`` has of it."""
    kept = []
    for line in reversed(lines):
        prompt_id = json.loads(line)["prompt_id"]
        if pending[prompt_id]:
            pending[prompt_id] -= 1
        else:
            kept.append(line)
    return kept[::-1]
