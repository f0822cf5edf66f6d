"""Async iterators over what is there already, for the seams that take a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


async def each(items: Iterable[Item]) -> AsyncIterator[Item]:
    """Every item in its order. Others get a turn between two of them, so that a long list does not hold up the event loop."""
    for item in items:
        yield item
        await asyncio.sleep(0)
