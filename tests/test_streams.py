"""A list as a stream: all of it, in order, and with a turn for others between two items."""

from __future__ import annotations

import asyncio

from bbopd.data.streams import each


async def test_each_gives_every_item_and_others_a_turn() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    other = asyncio.create_task(count())
    assert [item async for item in each((3, 1, 2))] == [3, 1, 2]
    other.cancel()
    assert turns >= 2
