"""Two tokenisations of one text, side by side: the smallest runs of tokens on both sides that spell the same bytes.

``G`` groups; ``V`` ids of a vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["SpelledVocabulary", "align_tokens", "align_tokens_reference"]


@dataclass(frozen=True, slots=True, eq=False)
class SpelledVocabulary:
    """What each id of a vocabulary puts into a text: ``spelling[offsets[id]:offsets[id + 1]]`` where ``is_text[id]``."""

    offsets: np.ndarray  # [V + 1] int64
    spelling: np.ndarray  # uint8
    is_text: np.ndarray  # [V] uint8; 0: an id without a token, or a token that is a mark and no text

    @classmethod
    def of(cls, spelled: Mapping[int, bytes]) -> SpelledVocabulary:
        """Of ids and their bytes; an id that is not there is no text."""
        size = 1 + max(spelled, default=-1)
        lengths, is_text = np.zeros(size, np.int64), np.zeros(size, np.uint8)
        for index, raw in spelled.items():
            lengths[index], is_text[index] = len(raw), 1
        spelling = b"".join(spelled[index] for index in sorted(spelled))
        return cls(np.concatenate([[0], np.cumsum(lengths)]), np.frombuffer(spelling, np.uint8), is_text)

    def __getitem__(self, index: int) -> bytes | None:
        """The bytes of an id; None for one that is no text."""
        if not 0 <= index < len(self.is_text) or not self.is_text[index]:
            return None
        return self.spelling[self.offsets[index] : self.offsets[index + 1]].tobytes()


def align_tokens(first_ids: Sequence[int], first: SpelledVocabulary, second_ids: Sequence[int], second: SpelledVocabulary) -> np.ndarray:
    """The finest common segmentation of two tokenisations, as far as both spell the same bytes.

    Row ``g`` of the result and the row after it bound group ``g``: tokens ``[g, 0]`` to ``[g + 1, 0]`` of the first and ``[g, 1]`` to
    ``[g + 1, 1]`` of the second have the same bytes, and no fewer tokens do. The last row is where that ends: at the first byte that
    differs, at an id that is no text, or at the end of a side. A token without bytes belongs to the group before it, one at the start to
    the first group.

    Parameters
    ----------
    first_ids, second_ids : token ids of each side.
    first, second : what these stand for.

    Returns
    -------
    ndarray [G + 1, 2] int64, from (0, 0) on, rising in both columns.
    """
    try:
        from bbopd._C import align_tokens as align
    except ImportError:
        return align_tokens_reference(first_ids, first, second_ids, second)
    a, b = np.ascontiguousarray(first_ids, np.int64), np.ascontiguousarray(second_ids, np.int64)
    ends = np.empty((min(len(a), len(b)) + 1, 2), np.int64)
    ends[0] = 0
    count = align((a.ctypes.data, len(a)), _addresses(first), (b.ctypes.data, len(b)), _addresses(second), ends[1:].ctypes.data)
    return ends[: count + 1]


def _addresses(vocabulary: SpelledVocabulary) -> tuple[int, int, int, int]:
    return (
        vocabulary.offsets.ctypes.data,
        vocabulary.spelling.ctypes.data,
        vocabulary.is_text.ctypes.data,
        len(vocabulary.is_text),
    )


def align_tokens_reference(
    first_ids: Sequence[int], first: SpelledVocabulary, second_ids: Sequence[int], second: SpelledVocabulary
) -> np.ndarray:
    """`align_tokens` in Python: the truth that the C++ is held to, and what runs where that is not there."""
    ends, a, b = [(0, 0)], _Reader(first_ids, first), _Reader(second_ids, second)
    while a.fill() and b.fill():
        common = min(len(a.left), len(b.left))
        if a.left[:common] != b.left[:common]:
            break
        a.left, b.left = a.left[common:], b.left[common:]
        if not a.left and not b.left:
            a.take_empty()
            b.take_empty()
            ends.append((a.taken, b.taken))
    return np.array(ends, np.int64)


class _Reader:
    """Reads the bytes of tokens one token after another."""

    def __init__(self, ids: Sequence[int], vocabulary: SpelledVocabulary) -> None:
        self._ids, self._vocabulary = ids, vocabulary
        self.taken, self.left = 0, b""

    def fill(self) -> bool:
        """Go on to a token with bytes, where the last one has been read; False at the end of the text."""
        while not self.left:
            raw = self._next()
            if raw is None:
                return False
            self.taken, self.left = self.taken + 1, raw
        return True

    def take_empty(self) -> None:
        while self._next() == b"":
            self.taken += 1

    def _next(self) -> bytes | None:
        return self._vocabulary[int(self._ids[self.taken])] if self.taken < len(self._ids) else None
