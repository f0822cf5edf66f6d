"""Claim: top-64 answers cross the wire in at most 400 bytes a token, checked and made into tensors, many times faster than as JSON."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from benchmarks import rates
from benchmarks.conftest import QUICK_ROUNDS, ROUNDS
from benchmarks.wire import CONTESTANTS, Contest, bytes_per_token
from benchmarks.wire_peers import PEERS
from benchmarks.wire_server import server_process

TASK = "Top-64, tail and own logprob of 128 to 384 response tokens, V = 128,256: from rollouts to assembled torch tensors"
NOTES = {peer.name: peer.note for peer in PEERS}


def test_wire(request: pytest.FixtureRequest) -> None:
    rounds = request.config.getoption("rounds") or (QUICK_ROUNDS if request.config.getoption("quick") else ROUNDS)
    runners = {
        name: rates.Runner(name, NOTES.get(name, "server with scheduler, limits and credits; client checks all")) for name in CONTESTANTS
    }
    with contextlib.ExitStack() as servers, asyncio.Runner() as loop:
        contest = Contest({name: servers.enter_context(server_process(name)) for name in CONTESTANTS})
        for number in range(-1, rounds):  # the first warms up
            for place in range(len(CONTESTANTS)):
                name = CONTESTANTS[(place + number) % len(CONTESTANTS)]
                done = loop.run(contest.run(name))
                if number >= 0:
                    runners[name].rates.append(done.tokens / done.seconds)
        for name in CONTESTANTS:
            answers, questions = loop.run(bytes_per_token(contest, name))
            runners[name].figures |= {"bytes a token": f"{answers:,.1f}", "of questions": f"{questions:.1f}"}
    print(rates.publish("wire", TASK, list(runners.values()), "a process each for client and server").read_text())
