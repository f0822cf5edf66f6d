"""Prompts from a data set that is never in memory as a whole: read in blocks, each shuffled, and found again at any draw.

A block is the next ``buffer`` documents of an epoch, in which shards come in an order of their own (with ``limit``, in that of the data
set). It is read, copies and what is held out are dropped, and the rest is drawn in random order, one prompt a document: of running text
one window, another in every epoch. Nothing depends on anything but the seed and the rows, so that a place among the draws is a small note:
where the block began, and how many documents of it are done with. Who goes on from there reads that block again, and no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from bbopd.config import PromptSource
from bbopd.data import rows
from bbopd.data.distinct import Distinct
from bbopd.data.documents import Document
from bbopd.data.near_duplicates import NearDuplicates
from bbopd.data.shards import BEGINNING, RowPlace, RowReader, ShardedRows
from bbopd.errors import DataError
from bbopd.types import Prompt

Encode = Callable[[Sequence[Document]], Iterable[Prompt]]


@dataclass(frozen=True, slots=True)
class Flow:
    """What is needed to draw from one source: how documents become prompts, and which are held out. ``samples`` are of its first ones."""

    source: PromptSource
    encode: Encode
    is_held_out: Callable[[Document], bool]
    samples: list[Prompt]
    near_duplicates: float | None = None

    def open(self, seed: Sequence[int], prepare: Callable[[Prompt], Prompt], *, labelled: bool) -> FlowReader:
        """Its sequence of prompts, as ``prepare`` leaves them; with ``labelled``, of those that have a known continuation."""
        return FlowReader(self, seed, prepare, labelled=labelled)


@dataclass(frozen=True, slots=True)
class Bookmark:
    """Between two draws of one sequence."""

    epoch: int = 0
    block: int = 0
    start: RowPlace = BEGINNING  # of the block
    before: RowPlace | None = None  # start of the block before it, in the same epoch
    offset: int = 0  # documents of the block that are done with
    given: int = 0  # prompts, from the beginning
    given_before_epoch: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)  # documents and rows by reason, those of blocks that are done with

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Bookmark:
        before = data["before"]
        places = {"start": RowPlace(**data["start"]), "before": None if before is None else RowPlace(**before)}
        return cls(**{**data, **places})


@dataclass(frozen=True, slots=True)
class _Block:
    documents: list[Document]
    distinct: Distinct  # knows all documents of this block, and of no other
    end: RowPlace
    is_last: bool  # of its epoch
    left_out: Counter[str]


class FlowReader:
    """One sequence of prompts; made by `Flow.open`. ``bookmark`` is its place, and setting it goes on from there."""

    def __init__(self, flow: Flow, seed: Sequence[int], prepare: Callable[[Prompt], Prompt], *, labelled: bool) -> None:
        self._flow, self._seed, self._prepare, self._labelled = flow, seed, prepare, labelled
        self._mark = Bookmark()
        self._order = np.empty(0, dtype=np.int64)  # in which documents of the block are drawn
        self._reader: RowReader | None = None
        self._block: _Block | None = None
        self._previous: Distinct | None = None  # of the block before, where that is in memory

    @cached_property
    def _rows(self) -> ShardedRows:
        return ShardedRows(self._flow.source)

    def at(self, place: int) -> Prompt:
        """The prompt at ``place``; places that rise are read once. Raises `DataError`."""
        if place < self._mark.given:
            self.bookmark = asdict(Bookmark())
        while True:
            prompt = self._next()
            if self._mark.given > place:
                return prompt

    @property
    def bookmark(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self._mark)

    @bookmark.setter
    def bookmark(self, value: Mapping[str, Any]) -> None:
        mark = Bookmark.from_json(value)
        if (mark.epoch, mark.block) != (self._mark.epoch, self._mark.block):
            self._block = self._previous = None
        self._mark = mark

    def close(self) -> None:
        """Read no further. Harmless where nothing is being read."""
        if self._reader is not None:
            self._reader.close()

    def _next(self) -> Prompt:
        while True:
            if self._block is None:
                self._load()
            prompt = self._next_of_block()
            if prompt is not None:
                return prompt
            self._turn_page()

    def _next_of_block(self) -> Prompt | None:
        assert self._block is not None
        while (offset := self._mark.offset) < len(self._order):
            document = self._block.documents[self._order[offset]]
            prompts = [self._prepare(prompt) for prompt in self._flow.encode([document])]
            self._mark = replace(self._mark, offset=offset + 1)
            if not prompts:
                self._leave_out({"too_short" if document.text is not None else "long_prompt": 1})
            elif prompts[0].reference_ids or not self._labelled:
                self._mark = replace(self._mark, given=self._mark.given + 1)
                return prompts[self._random(offset).integers(len(prompts))]
        return None

    def _leave_out(self, counts: Mapping[str, int]) -> None:
        self._mark = replace(self._mark, left_out=dict(Counter(self._mark.left_out) + Counter(counts)))

    def _turn_page(self) -> None:
        mark, block = self._mark, self._block
        assert block is not None
        self._leave_out(block.left_out)
        if not block.is_last:
            self._mark = replace(self._mark, block=mark.block + 1, start=block.end, before=mark.start, offset=0)
            self._block, self._previous = None, block.distinct
            return
        if mark.given == mark.given_before_epoch:
            counts = ", ".join(f"{reason} {count}" for reason, count in sorted(self._mark.left_out.items()))
            what = "with a known continuation" if self._labelled else "to train on"
            raise DataError(f"nothing {what} in all of {self._flow.source.name} (left out: {counts or 'what is held out'})")
        self._mark = Bookmark(epoch=mark.epoch + 1, given=mark.given, given_before_epoch=mark.given, left_out=self._mark.left_out)
        if mark.block == 0 and self._shards(mark.epoch) == self._shards(mark.epoch + 1):
            self._shuffle()  # an epoch is one block, and it is there
        else:
            self._block = None

    # ------------------------------------------------------------ blocks

    def _load(self) -> None:
        mark = self._mark
        if self._previous is None and mark.before is not None:
            self._previous = self._read(mark.before, mark.block - 1, None).distinct
        self._block, self._previous = self._read(mark.start, mark.block, self._previous), None
        self._shuffle()

    def _shuffle(self) -> None:
        assert self._block is not None
        self._order = self._random().permutation(len(self._block.documents))

    def _read(self, start: RowPlace, number: int, previous: Distinct | None) -> _Block:
        source = self._flow.source
        room = source.buffer if source.limit is None else min(source.buffer, source.limit - number * source.buffer)
        threshold = self._flow.near_duplicates
        distinct = Distinct(None if threshold is None else NearDuplicates(threshold, None, "data.near_duplicates"))
        kept, left_out, count = [], Counter[str](), 0
        reader = self._reader_at(start)
        for document in islice(rows.dataset(source, reader, left_out), room):
            count += 1
            reason = distinct.find_or_add(document) or (previous.find(document) if previous is not None else None)
            if reason is not None:
                left_out[reason] += 1
            elif not self._flow.is_held_out(document):
                kept.append(document)
        is_last = count < room or (source.limit is not None and (number + 1) * source.buffer >= source.limit)
        return _Block(kept, distinct, reader.place, is_last, left_out)

    def _reader_at(self, start: RowPlace) -> RowReader:
        """One that goes on reading, where it is there already."""
        order = self._shards(self._mark.epoch)
        if self._reader is None or self._reader.order != order or self._reader.place != start:
            self.close()
            self._reader = self._rows.read(order, start)
        return self._reader

    def _shards(self, epoch: int) -> list[int]:
        if self._flow.source.limit is not None:
            return list(range(self._rows.count))
        return np.random.default_rng([*self._seed, epoch]).permutation(self._rows.count).tolist()

    def _random(self, *number: int) -> np.random.Generator:
        return np.random.default_rng([*self._seed, self._mark.epoch, self._mark.block, *number])
