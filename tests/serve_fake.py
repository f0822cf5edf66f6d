"""A `FakeBackend` behind a real server in a process of its own, for tests that kill it. Prints its port."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator

VOCAB = 97


async def serve(port: int, delay: float, batch_tokens: int) -> None:
    from bbopd.rpc.server import start_server
    from bbopd.teachers.fake import FakeBackend

    server = await start_server(FakeBackend(VOCAB, delay=delay), port=port, batch_tokens=batch_tokens)
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    print(server.port, flush=True)
    await stopping.wait()
    await server.stop(5.0)


def start_process(port: int = 0, delay: float = 0.0, batch_tokens: int = 2048) -> tuple[subprocess.Popen[str], int]:
    """Start one and wait until it answers; with its port."""
    command = [sys.executable, "-m", "tests.serve_fake", str(port), str(delay), str(batch_tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, "the server ended before it answered"
    return process, int(line)


def end_process(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@contextlib.contextmanager
def processes(count: int, **options: float) -> Iterator[list[tuple[subprocess.Popen[str], int]]]:
    started = []
    try:
        for _ in range(count):
            started.append(start_process(**options))  # type: ignore[arg-type]
        yield started
    finally:
        for process, _ in started:
            end_process(process)


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
