"""A TCP proxy that does to a connection what networks do: break it, swallow it, delay it, throttle it. Seeded, one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import random
import struct
from collections.abc import AsyncIterator

_PIECE = 64 * 1024  # bytes moved at once


class FaultProxy:
    """Passes bytes between 127.0.0.1:``port`` and 127.0.0.1:``upstream``, as well as its settings let it.

    Settings may be changed at any time and hold for open connections too.
    """

    def __init__(self, upstream: int, seed: int = 0) -> None:
        self.port = 0
        self.upstream = upstream
        self.is_black_hole = False
        """Connections stay open, and nothing passes either way."""
        self.delay = 0.0
        """Seconds added to every piece, on average (half to one and a half of it)."""
        self.bytes_per_second = 0.0
        """Towards the client; 0 is as fast as it goes."""
        self.reset_after = 0
        """Bytes towards the client after which a connection is reset, on average (half to one and a half of it); 0: never."""
        self.connections = 0
        self.to_client = 0
        """Bytes passed towards the client so far."""
        self._random = random.Random(seed)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        """Listen, on the same port as before where there was one."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def kill(self) -> None:
        """Refuse new connections and reset the open ones, as a host does whose process has died."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            _reset(writer)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        self.connections += 1
        upstream: asyncio.StreamWriter | None = None
        try:
            from_upstream, upstream = await asyncio.open_connection("127.0.0.1", self.upstream)
            self._writers.add(upstream)
            left = int(self.reset_after * self._random.uniform(0.5, 1.5)) or None
            ways = [
                asyncio.create_task(self._pass(reader, upstream, is_to_client=False, left=None)),
                asyncio.create_task(self._pass(from_upstream, writer, is_to_client=True, left=left)),
            ]
            try:
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for each in (writer, upstream):
                if each is not None:
                    self._writers.discard(each)
                    _reset(each)
            self._tasks.discard(task)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_to_client: bool, left: int | None) -> None:
        while piece := await reader.read(_PIECE):
            while self.is_black_hole:
                await asyncio.sleep(0.02)
            if self.delay:
                await asyncio.sleep(self.delay * self._random.uniform(0.5, 1.5))
            if is_to_client and self.bytes_per_second:
                await asyncio.sleep(len(piece) / self.bytes_per_second)
            if left is not None:
                piece = piece[:left]
                left -= len(piece)
            writer.write(piece)
            await writer.drain()
            self.to_client += len(piece) if is_to_client else 0
            if left == 0:
                return


def _reset(writer: asyncio.StreamWriter) -> None:
    """Close with RST instead of FIN: what is still on its way is lost, as when a process is killed."""
    socket = writer.get_extra_info("socket")
    if socket is not None:
        with contextlib.suppress(OSError):
            socket.setsockopt(1, 13, struct.pack("ii", 1, 0))  # SOL_SOCKET, SO_LINGER
    writer.transport.abort()


@contextlib.asynccontextmanager
async def proxied(upstream: int, seed: int = 0) -> AsyncIterator[FaultProxy]:
    proxy = FaultProxy(upstream, seed)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.kill()
