"""Scored sequences on their way to the trainer: a bounded queue that is left in batches of tokens, in the order of arrival."""

from __future__ import annotations

from collections import deque

from bbopd.data.assemble import Item, rollout_of


class BatchQueue:
    """Holds at most ``room`` sequences. A batch has about ``batch_tokens`` response tokens: it ends with the sequence nearest to that."""

    def __init__(self, *, room: int, batch_tokens: int) -> None:
        self._room, self._batch_tokens = room, batch_tokens
        self._items: deque[Item] = deque()
        self._tokens = 0
        self.rollout_tokens = 0
        """Of those held that the student wrote."""

    def __len__(self) -> int:
        return len(self._items)

    @property
    def is_full(self) -> bool:
        return len(self._items) >= self._room

    @property
    def has_batch(self) -> bool:
        """Whether a batch is there; one that fills the queue is, however short."""
        return self._tokens >= self._batch_tokens or self.is_full

    def append(self, item: Item) -> None:
        rollout = rollout_of(item)
        self._items.append(item)
        self._tokens += len(rollout)
        self.rollout_tokens += 0 if rollout.is_labelled else len(rollout)

    def take(self, *, is_last: bool) -> list[Item]:
        """The next batch. ``is_last``: no more comes for now, so that a remnant, which would be a step of its own, goes with it."""
        taken: list[Item] = []
        tokens = 0
        while self._items:
            rollout = rollout_of(self._items[0])
            length = len(rollout)
            is_remnant = is_last and self._tokens < self._batch_tokens // 2
            if taken and not is_remnant and abs(tokens + length - self._batch_tokens) > abs(self._batch_tokens - tokens):
                break
            taken.append(self._items.popleft())
            tokens += length
            self._tokens -= length
            self.rollout_tokens -= 0 if rollout.is_labelled else length
        return taken
