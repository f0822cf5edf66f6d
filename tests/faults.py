"""What tests of a remote teacher share: rollouts, a client, and the question whether anything was lost, repeated, or misplaced."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence

import numpy as np

from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, ScoredRollout, SignalSpec
from tests.waiting import PATIENCE


def make_rollouts(count: int, vocab_size: int, *, seed: int = 0, length: int = 0) -> list[Rollout]:
    """``count`` rollouts of ``length`` response tokens, or of 1 to 30."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        prompt = Prompt(f"p{number}", tuple(random.integers(0, vocab_size, random.integers(1, 9)).tolist()))
        answer = random.integers(0, vocab_size, length or random.integers(1, 31))
        made.append(Rollout(f"r{number}", prompt, tuple(answer.tolist())))
    return made


async def stream(items: Iterable[Rollout]) -> AsyncIterator[Rollout]:
    for item in items:
        await asyncio.sleep(0)
        yield item


async def score_all(teacher: RemoteTeacher, rollouts: Sequence[Rollout], want: SignalSpec) -> list[ScoredRollout]:
    return [scored async for scored in teacher.score(stream(rollouts), want)]


@contextlib.asynccontextmanager
async def connected(*ports: int, timeout: float = PATIENCE, **options) -> AsyncIterator[RemoteTeacher]:
    teacher = await RemoteTeacher.connect([f"grpc://127.0.0.1:{port}" for port in ports], timeout=timeout, **options)
    try:
        yield teacher
    finally:
        await teacher.close()


def assert_nothing_lost(backend: FakeBackend, rollouts: Sequence[Rollout], scored: Sequence[ScoredRollout], want: SignalSpec) -> None:
    """Every rollout was answered exactly once, and every row is the backend's own distribution of that token."""
    assert Counter(id(item.rollout) for item in scored) == Counter(id(rollout) for rollout in rollouts)
    for item in scored:
        z = backend.logits(item.rollout)
        if want.level == "full":
            np.testing.assert_array_equal(item.signal.logits, (z - z.max(axis=1, keepdims=True)).astype(np.float16))
            continue
        z = z.astype(np.float64) / want.temperature
        dense = z - z.max(axis=1, keepdims=True)
        dense -= np.log(np.exp(dense).sum(axis=1, keepdims=True))
        own = np.take_along_axis(dense, np.array(item.rollout.token_ids)[:, None], 1)[:, 0]
        np.testing.assert_allclose(item.signal.sampled, own, atol=1e-5)
        if want.level == "topk":
            ids = np.argsort(-dense, axis=1, kind="stable")[:, : want.top_k]
            np.testing.assert_array_equal(item.signal.ids, ids)
            np.testing.assert_allclose(item.signal.logprobs, np.take_along_axis(dense, ids, 1), atol=5e-3)


async def collect(iterator):
    return [item async for item in iterator]


@contextlib.asynccontextmanager
async def served(backend, *, timeout=PATIENCE, inflight_tokens=8192, **options) -> AsyncIterator[RemoteTeacher]:
    server = await start_server(backend, **options)
    teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}", timeout=timeout, inflight_tokens=inflight_tokens)
    try:
        yield teacher
    finally:
        await teacher.close()
        await server.stop(0.5)


async def score_while(teacher: RemoteTeacher, rollouts: list[Rollout], want: SignalSpec, happens, after: int = 20) -> list:
    """Score, and let something happen once ``after`` answers are there."""
    scored = []
    happening = None
    try:
        async for item in teacher.score(stream(rollouts), want):
            scored.append(item)
            if len(scored) == after:
                happening = asyncio.create_task(happens())
        assert happening is not None
        await happening
    finally:
        if happening is not None:
            happening.cancel()
            await asyncio.gather(happening, return_exceptions=True)
    return scored
