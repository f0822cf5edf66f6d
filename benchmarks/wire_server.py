"""One contestant's server in a process of its own, until killed: ``python -m benchmarks.wire_server NAME`` prints its port."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator

import grpc

from bbopd.rpc.channel import channel_options
from bbopd.rpc.freed_memory import keep_freed_memory
from bbopd.rpc.server import start_server
from benchmarks.contest import ROOT
from benchmarks.wire_load import InstantBackend, Load
from benchmarks.wire_peers import PEERS, Encoding

BBOPD = "bbopd, packed"
BATCH_TOKENS = 8192  # of one call of the model: one this fast would not be given less
METHOD = "/bbopd.benchmark.Peer/Score"


@contextlib.contextmanager
def server_process(name: str) -> Iterator[int]:
    """The port of a contestant's server, for as long as it is wanted."""
    command = [sys.executable, "-m", "benchmarks.wire_server", name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise RuntimeError(f"the server of {name!r} ended before it answered")
            yield int(line)
        finally:
            process.kill()


async def serve(name: str) -> None:
    keep_freed_memory()  # all alike
    load = Load()
    if name == BBOPD:
        running = await start_server(InstantBackend(load), batch_tokens=BATCH_TOKENS)
        gc.freeze()  # as `bbopd serve` does
        print(running.port, flush=True)
    else:
        encoding = next(one for one in PEERS if one.name == name)
        server = grpc.aio.server(options=channel_options())
        handler = grpc.stream_stream_rpc_method_handler(Peer(encoding, load).answer)
        service, method = METHOD.strip("/").split("/")
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        print(port, flush=True)
    await asyncio.Event().wait()


class Peer:
    """Answers what comes, in turn."""

    def __init__(self, encoding: Encoding, load: Load) -> None:
        self._encoding = encoding
        self._load = load

    async def answer(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> AsyncIterator[bytes]:
        async for request in requests:
            yield self._encoding.encode_answer(self._encoding.decode_question(request), self._load)


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1]))
