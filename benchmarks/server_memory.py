"""A real server's resident memory while it answers requests of mixed length, level and width; random tokens, an instant backend."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, SignalSpec
from benchmarks.contest import ROOT

VOCAB = 97
MARKS = (1_000, 5_000, 10_000)
WARM = 1_000  # requests after which nothing should grow any more
BOUND_MIB = 32.0  # that it may grow by from there, for arenas of malloc
REPLAY_BYTES = 8 * 2**20  # of answers kept: full before memory is looked at first, which the 256 MiB of `bbopd serve` would not be
_WANTS = (SignalSpec("topk", 1.0, 64), SignalSpec("sampled"), SignalSpec("full"), SignalSpec("topk", 2.0, 8))
_BATCH = 100  # requests of one level at a time


@dataclass(slots=True)
class Resident:
    """MiB after so many requests."""

    at: dict[int, float] = field(default_factory=dict)

    @property
    def growth(self) -> float:
        return self.at[max(self.at)] - self.at[WARM]


async def measure(requests: int = MARKS[-1], seed: int = 0) -> Resident:
    """Ask a fresh server ``requests`` questions of 1 to 512 response tokens, and look at its memory at every mark."""
    found, random = Resident(), np.random.default_rng(seed)
    with subprocess.Popen([sys.executable, "-m", "benchmarks.server_memory"], stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{int(process.stdout.readline())}")
        try:
            for done in range(0, requests, _BATCH):
                rollouts = [_rollout(done + number, random) for number in range(_BATCH)]
                answers = [scored async for scored in teacher.score(_stream(rollouts), _WANTS[done // _BATCH % len(_WANTS)])]
                assert len(answers) == _BATCH
                if done + _BATCH in MARKS or done + _BATCH == requests:
                    await asyncio.sleep(0.2)
                    found.at[done + _BATCH] = resident_mib(process.pid)
        finally:
            await teacher.close()
            process.kill()
    return found


async def serve() -> None:
    running = await start_server(FakeBackend(VOCAB), replay_bytes=REPLAY_BYTES)
    print(running.port, flush=True)
    await asyncio.Event().wait()


def resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS:"))


def _rollout(number: int, random: np.random.Generator) -> Rollout:
    prompt, answer = (tuple(random.integers(0, VOCAB, random.integers(1, most)).tolist()) for most in (65, 513))
    return Rollout(f"r{number}", Prompt(f"p{number}", prompt), answer)


async def _stream(rollouts: Sequence[Rollout]) -> AsyncIterator[Rollout]:
    for rollout in rollouts:
        yield rollout


if __name__ == "__main__":
    asyncio.run(serve())
