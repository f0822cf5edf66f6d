"""Real teacher servers on an event loop of their own, for tests of commands, which run one themselves."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine, Iterator
from typing import Any

from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.server import RunningServer, start_server


@contextlib.contextmanager
def serving(backend: TeacherBackend, count: int = 1, **options: Any) -> Iterator[list[RunningServer]]:
    """``count`` replicas of a teacher, in another thread; ``options`` are those of `start_server`."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait_for(work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    servers = [wait_for(start_server(backend, **options)) for _ in range(count)]
    try:
        yield servers
    finally:
        for server in servers:
            wait_for(server.stop(0.2))
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
