"""The micro-batches of one optimizer step, cut anew so that several ranks are busy alike."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

from bbopd.data.assemble import Item, rollout_of


def share_over_ranks(micro_items: Sequence[Sequence[Item]], ranks: int, micro_batch_tokens: int) -> list[list[Item]]:
    """The same sequences as micro-batches, of which rank ``r`` takes those at ``r``, ``r + ranks``, ... and all ranks one at a time.

    Those of one round, which wait for each other, hold about the same number of packed tokens: the longest sequence goes first, each into
    the batch that holds least so far (Graham 1969, at most 4/3 of the best there is). There are as few rounds as ``micro_batch_tokens``
    allows, which a single longer sequence may exceed; in the last one, batches may be missing.
    """
    items = [item for items in micro_items for item in items]
    sizes = [len(rollout_of(item).all_ids) for item in items]
    rounds = max(1, math.ceil(sum(sizes) / (ranks * micro_batch_tokens)))
    while True:
        filled = _fill(sizes, rounds * ranks)
        if all(len(batch) == 1 or sum(sizes[index] for index in batch) <= micro_batch_tokens for batch in filled):
            break
        rounds += 1
    filled.sort(key=lambda batch: -sum(sizes[index] for index in batch))
    return [[items[index] for index in sorted(batch)] for batch in filled]


def _fill(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``sizes`` in up to ``count`` batches, none of them empty."""
    batches: list[list[int]] = [[] for _ in range(count)]
    lightest = [(0, place) for place in range(count)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        held, place = heapq.heappop(lightest)
        batches[place].append(index)
        heapq.heappush(lightest, (held + sizes[index], place))
    return [batch for batch in batches if batch]
