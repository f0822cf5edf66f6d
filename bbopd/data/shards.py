"""Rows of a data set as they come, shard by shard, from any place on: by ``datasets`` in streaming mode, which holds a few at a time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bbopd.config import PromptSource
from bbopd.data.rows import Row
from bbopd.errors import DataError

if TYPE_CHECKING:
    from datasets import IterableDataset


@dataclass(frozen=True, slots=True)
class RowPlace:
    """Between two rows: how many shards of an order are done with, how many rows of the next one, and the reader's own note of that."""

    shards: int = 0
    rows: int = 0
    state: dict[str, Any] | None = None


BEGINNING = RowPlace()


class ShardedRows:
    """A data set whose rows are read as they are wanted. Whatever reads it raises `DataError` where it cannot be had."""

    def __init__(self, source: PromptSource) -> None:
        import datasets

        self.label = f"dataset {source.dataset}" + (f" ({source.subset})" if source.subset else "")
        self.name = str(source.dataset)
        with self.errors():
            self._data: IterableDataset = datasets.load_dataset(self.name, source.subset, split=source.split, streaming=True)
            self.count = int(self._data.num_shards)

    def read(self, order: Sequence[int], place: RowPlace) -> RowReader:
        """Rows of the shards in ``order``, from ``place`` on."""
        return RowReader(self, order, place)

    def shard(self, index: int) -> IterableDataset:
        return self._data.shard(num_shards=self.count, index=index)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Those of reading, as `DataError`."""
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            raise DataError(
                f"{self.label} cannot be read: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}. "
                "Check its name, subset, split and the network, or use a local file (jsonl, parquet, text)"
            ) from error


class RowReader:
    """An iterator over rows that knows its place; made by `ShardedRows.read`, ended by `close`."""

    def __init__(self, source: ShardedRows, order: Sequence[int], place: RowPlace) -> None:
        self.order = order
        self._source = source
        self._shards, self._count, self._state = place.shards, place.rows, place.state
        self._shard: IterableDataset | None = None
        self._rows: Iterator[Any] = iter(())
        self._end: Callable[[], Any] = lambda: None

    @property
    def place(self) -> RowPlace:
        return RowPlace(self._shards, self._count, self._state if self._shard is None else self._shard.state_dict())

    def __iter__(self) -> RowReader:
        return self

    def __next__(self) -> Row:
        while self._shards < len(self.order):
            with self._source.errors():
                if self._shard is None:
                    self._open()
                row = next(self._rows, None)
            if row is not None:
                self._count += 1
                return self._named(self._count - 1, row)
            self.close()
            self._shards, self._count = self._shards + 1, 0
        raise StopIteration

    def close(self) -> None:
        """Read no further. Harmless where nothing is being read."""
        self._end()
        self._shard, self._state = None, None

    def _open(self) -> None:
        self._shard = self._source.shard(self.order[self._shards])
        if self._state is not None:
            self._shard.load_state_dict(self._state)
        rows = iter(self._shard)
        self._rows, self._end = rows, weakref.finalize(self, rows.close)  # threads that read ahead must not outlive the interpreter

    def _named(self, number: int, row: Any) -> Row:
        source = self._source
        if source.count == 1:
            return f"{source.name}:{number}", f"{source.label} row {number}", row
        shard = self.order[self._shards]
        return f"{source.name}:{shard}:{number}", f"{source.label} shard {shard} row {number}", row
