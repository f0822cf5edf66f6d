"""Several engines write as one: which of them writes does not matter, nor do those that come and go meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from bbopd.errors import DataError, EngineError
from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions
from bbopd.rollouts.vllm_fleet import EngineFleet
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_remote import EngineServer
from bbopd.rollouts.vllm_server import SampleServer
from bbopd.rpc.security import ClientAccess, ServerAccess
from bbopd.types import Prompt, Sampling
from tests.fake_engine import HANGS
from tests.test_vllm_remote import PROMPTS, expected, write
from tests.tiny_models import tiny_llama
from tests.waiting import PATIENCE, until, unused_port


class Fleet:
    """Servers in this process, and a fleet over those in the file."""

    def __init__(self, folder: Path) -> None:
        self.file, self.folder, self.model = folder / "engines.txt", folder, tiny_llama()
        self.servers: dict[str, SampleServer] = {}
        self.processes: dict[str, EngineProcess] = {}
        self.notes: list[str] = []

    async def serve(self, port: int = 0) -> str:
        async def start(environment, log, shared_files):
            self.processes[target] = await EngineProcess.start(os.environ, log, shared_files=shared_files, module="tests.fake_engine")
            return self.processes[target]

        place = {"host": "127.0.0.1", "port": port, "device": torch.device("cpu"), "access": ServerAccess()}
        server = await SampleServer.start(start_process=start, **place)
        target = server.target
        self.servers[target] = server
        return target

    def list(self, *targets: str) -> None:
        unfinished = self.file.with_suffix(".new")
        unfinished.write_text("\n".join(targets))
        unfinished.replace(self.file)

    @contextlib.asynccontextmanager
    async def open(self, timeout: float = 2 * PATIENCE):
        async def start(target: str) -> VLLMEngine:
            options, place = VLLMOptions(64, max_batch=2), EngineServer(target, ClientAccess())
            return await VLLMEngine.start(self.model, options, eos_token_ids=(2,), folder=self.folder, server=place)

        fleet = await EngineFleet.open(self.file, start, dtype=torch.float32, timeout=timeout, note=self.notes.append)
        try:
            yield fleet
        finally:
            await fleet.close()


@pytest.fixture
async def rig(tmp_path):
    rig = Fleet(tmp_path)
    yield rig
    for server in rig.servers.values():
        await until(lambda server=server: not server._sessions.is_taken)  # the fleet has let go of it
        await server.stop()


async def test_two_engines_write_what_one_would_and_share_the_work(rig):
    first, second = await rig.serve(), await rig.serve()
    rig.list(first, second)
    async with rig.open() as fleet:
        await until(lambda: len(rig.notes) == 2)
        for version in (3, 4):
            await fleet.load_weights(rig.model.named_parameters(), version)
            rollouts = await write(fleet)
            assert [rollout.token_ids for rollout in rollouts] == expected(rig.model.named_parameters(), torch.float32)
            assert [rollout.draw for rollout in rollouts] == list(range(len(PROMPTS)))
            assert {rollout.weights_version for rollout in rollouts} == {version}
            with torch.no_grad():
                rig.model.model.layers[0].mlp.up_proj.weight[3, 5] += 0.5
    assert fleet.asked_again == 0


async def test_what_a_killed_engine_was_writing_is_written_by_another_of_the_same_version(rig):
    first, second = await rig.serve(), await rig.serve()
    rig.list(first)
    held, here = Prompt("held", (HANGS, 1)), asyncio.Event()

    async def prompts():
        yield held  # the first engine writes on it for ever, and on nothing else
        yield PROMPTS[1]
        await here.wait()
        for prompt in PROMPTS[2:]:
            yield prompt

    async with rig.open() as fleet:
        await fleet.load_weights(rig.model.named_parameters(), 7)
        found = []

        async def collect():
            async for rollout in fleet.generate(prompts(), Sampling(6, seed=4)):
                found.append(rollout)

        collecting = asyncio.create_task(collect())
        await until(lambda: any(len(stream.given.get(first, ())) == 2 for stream in fleet._streams))
        assert not found
        rig.list(first, second)
        await until(lambda: len(rig.notes) == 2)  # it has come while a stream is under way, after the push
        here.set()
        await until(lambda: len(found) >= 2)
        assert {rollout.weights_version for rollout in found} == {7}
        rig.processes[first].kill()
        await until(lambda: fleet.asked_again >= 2)
        rig.processes[second].kill()  # which has got the one that holds everything
        await until(lambda: sum("gone" in note for note in rig.notes) >= 2)
        collecting.cancel()
        await asyncio.gather(collecting, return_exceptions=True)
    counted = Counter(rollout.draw for rollout in found)
    assert set(counted.values()) == {1}
    known = expected(rig.model.named_parameters(), torch.float32)
    assert all(rollout.token_ids == known[rollout.draw] for rollout in found)


async def test_an_engine_that_comes_back_has_the_weights_and_takes_up_what_waited(rig):
    target = await rig.serve(unused_port())
    rig.list(target)
    async with rig.open() as fleet:
        await fleet.load_weights(rig.model.named_parameters(), 5)
        await rig.servers.pop(target).stop()
        await until(lambda: "gone" in rig.notes[-1])
        writing = asyncio.create_task(write(fleet))
        assert await rig.serve(int(target.rpartition(":")[2])) == target
        rollouts = await asyncio.wait_for(writing, 2 * PATIENCE)
        assert [rollout.token_ids for rollout in rollouts] == expected(rig.model.named_parameters(), torch.float32)
        assert {rollout.weights_version for rollout in rollouts} == {5}


async def test_an_engine_that_leaves_the_list_is_left(rig):
    first, second = await rig.serve(), await rig.serve()
    rig.list(first, second)
    async with rig.open() as fleet:
        await until(lambda: len(rig.notes) == 2)
        await fleet.load_weights(rig.model.named_parameters(), 1)
        rig.list(second)
        await until(lambda: not rig.servers[first]._sessions.is_taken)
        assert len(await write(fleet)) == len(PROMPTS)


async def test_errors_reach_whoever_waits(rig):
    rig.list("grpc://127.0.0.1:1")
    with pytest.raises(EngineError, match=r"engines.txt has answered for 1 s .*rollouts.timeout"):
        async with rig.open(timeout=1.0):
            pass
    target = await rig.serve()
    rig.list(target)
    async with rig.open() as fleet:
        await fleet.load_weights(rig.model.named_parameters(), 1)
        with pytest.raises(DataError, match="empty"):
            await write(fleet, [Prompt("nothing", ())])

        def failing():
            async def source():
                yield PROMPTS[0]
                raise ZeroDivisionError("the source has broken")

            return source()

        with pytest.raises(ZeroDivisionError):
            async for _ in fleet.generate(failing(), Sampling(6)):
                pass
        assert len(await write(fleet)) == len(PROMPTS)
        rig.list()
        await until(lambda: "gone" in rig.notes[-1])
        fleet._timeout = 1.0
        with pytest.raises(EngineError, match="no more in the list"):
            await write(fleet)


async def test_a_process_is_waited_for_though_its_caller_is_not(tmp_path) -> None:
    """Where no thread is free to wait in when the caller is cut off."""
    loop, held = asyncio.get_running_loop(), threading.Event()
    loop.set_default_executor(ThreadPoolExecutor(max_workers=1))
    process = await EngineProcess.start(os.environ, tmp_path / "log", module="tests.fake_engine")
    busy = loop.run_in_executor(None, held.wait)
    stopping = asyncio.create_task(process.stop())
    await asyncio.sleep(0)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    held.set()
    await busy
    await loop.run_in_executor(None, int)  # what was asked for before it is over then
    with pytest.raises(ChildProcessError):  # nothing is left to wait for
        os.waitpid(process.pid, os.WNOHANG)
