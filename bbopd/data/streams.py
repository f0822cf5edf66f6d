"""Async iterators over what is there already."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

Item = TypeVar("Item")


async def each(items: Iterable[Item]) -> AsyncIterator[Item]:
    """Yield ``items`` one by one, and let others run in between."""
    for item in items:
        yield item
        await asyncio.sleep(0)
