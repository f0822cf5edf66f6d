"""The contestants of the wire benchmark: rollouts go out, assembled torch tensors are there at the end, over loopback.

Client and server are a process each. Every answer is checked before it is used, but for the floor.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import grpc
import numpy as np

from bbopd.data.assemble import assemble
from bbopd.rpc.channel import channel_options
from bbopd.rpc.signals import check_signal
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Rollout, ScoredRollout
from benchmarks.wire_load import VOCAB, WANT, Load
from benchmarks.wire_peers import PEERS, Encoding
from benchmarks.wire_server import BBOPD, METHOD

BBOPD_TOKENS = 262_144  # of one round
STEP_TOKENS = 16_384  # response tokens of one assembled batch
INFLIGHT_TOKENS = 65_536  # sent and not yet answered, of every contestant


@dataclass(slots=True)
class Round:
    """What one contestant did: response tokens, the seconds they took, and how many batches of tensors they became."""

    tokens: int
    seconds: float
    batches: int


class Batches:
    """Collects answers into batches of `STEP_TOKENS`, as a trainer takes them."""

    def __init__(self) -> None:
        self.count = 0
        self.tokens = 0
        self._waiting: list[ScoredRollout] = []
        self._size = 0

    def add(self, scored: ScoredRollout) -> None:
        self._waiting.append(scored)
        self._size += len(scored.rollout)
        if self._size >= STEP_TOKENS:
            self.finish()

    def finish(self) -> None:
        if self._waiting:
            self.tokens += assemble(self._waiting, WANT).response_tokens
            self.count += 1
            self._waiting, self._size = [], 0


@dataclass
class Contest:
    """Every contestant's client, connected to its server; `ports` are those of `server_process`."""

    ports: dict[str, int]
    load: Load = field(default_factory=Load)

    async def run(self, name: str, tokens: int | None = None) -> Round:
        """One contestant's round: connect, then time from the first rollout to the last tensor."""
        if name == BBOPD:
            return await self.run_bbopd(self.ports[name], tokens or BBOPD_TOKENS)
        encoding = next(one for one in PEERS if one.name == name)
        return await self.run_peer(encoding, self.ports[name], tokens or encoding.tokens)

    async def run_bbopd(self, port: int, tokens: int) -> Round:
        teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{port}", inflight_tokens=INFLIGHT_TOKENS)
        rollouts, batches = self.load.rollouts(tokens), Batches()
        try:
            start = time.perf_counter()
            async for scored in teacher.score(_stream(rollouts), WANT):
                batches.add(scored)
            batches.finish()
            seconds = time.perf_counter() - start
        finally:
            await teacher.close()
        if teacher.counters.total() or batches.tokens != sum(map(len, rollouts)):
            raise RuntimeError(f"{batches.tokens} tokens came back, with {dict(teacher.counters)}")
        return Round(batches.tokens, seconds, batches.count)

    async def run_peer(self, encoding: Encoding, port: int, tokens: int) -> Round:
        rollouts, batches = self.load.rollouts(tokens), Batches()
        by_id = {rollout.rollout_id: rollout for rollout in rollouts}
        checked = 0
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=channel_options()) as channel:
            await channel.channel_ready()
            start = time.perf_counter()
            call = channel.stream_stream(METHOD)()
            ahead = INFLIGHT_TOKENS // 256  # rollouts
            writer = iter(rollouts)
            for rollout in itertools.islice(writer, ahead):
                await call.write(encoding.encode_question(rollout))
            for _ in rollouts:
                rollout_id, signal = encoding.decode_answer(await call.read())
                if (following := next(writer, None)) is not None:
                    await call.write(encoding.encode_question(following))
                rollout = by_id.pop(rollout_id)
                checked += len(rollout)
                if signal is not None:
                    check_signal(signal, WANT, np.array(rollout.token_ids, np.int32), VOCAB)
                    batches.add(ScoredRollout(rollout, signal))
            batches.finish()
            seconds = time.perf_counter() - start
            await call.done_writing()
        return Round(checked, seconds, batches.count)


async def _stream(rollouts: Sequence[Rollout]) -> AsyncIterator[Rollout]:
    for rollout in rollouts:
        yield rollout


CONTESTANTS = (BBOPD, *(encoding.name for encoding in PEERS))


async def bytes_per_token(contest: Contest, name: str) -> tuple[float, float]:
    """Bytes on the wire for each response token, framing and all: from the server, and to it. Counted by a relay between the two."""
    relay = Relay(contest.ports[name])
    await relay.start()
    try:
        done = await Contest({name: relay.port}, contest.load).run(name, 32_768 if name == BBOPD else 4096)
    finally:
        await relay.close()
    return relay.from_server / done.tokens, relay.to_server / done.tokens


class Relay:
    """Counts bytes between 127.0.0.1:``port`` and ``upstream``."""

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.from_server = 0
        self.to_server = 0
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await asyncio.gather(*self._connections)  # the client has hung up
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        await asyncio.gather(self._pass(reader, upstream_writer, False), self._pass(upstream_reader, writer, True))

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, is_from_server: bool) -> None:
        with contextlib.suppress(ConnectionError):  # who is done hangs up
            while piece := await reader.read(2**18):
                if is_from_server:
                    self.from_server += len(piece)
                else:
                    self.to_server += len(piece)
                writer.write(piece)
                await writer.drain()
        writer.close()
