"""An engine on another machine: weights that arrive bit by bit, who is let in, and every way in which it can be lost."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import shutil
from pathlib import Path

import grpc
import numpy as np
import pytest
import torch

from bbopd.config import ClientTlsConfig, RolloutsConfig, SampleServerConfig, ServerTlsConfig
from bbopd.data.streams import each
from bbopd.errors import ConfigError, EngineError, ModelError
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions, _seed_of
from bbopd.rollouts.vllm_messages import pack_json
from bbopd.rollouts.vllm_process import EngineProcess
from bbopd.rollouts.vllm_remote import METHOD, EngineServer
from bbopd.rollouts.vllm_server import SampleServer
from bbopd.rpc.renewal import AccessRenewal
from bbopd.rpc.security import ClientAccess, ServerAccess
from bbopd.types import Prompt, Sampling
from tests.certificates import make_certificates, replace_file
from tests.fake_engine import DIES, FAILS, HANGS, fingerprint, written
from tests.tiny_models import tiny_llama
from tests.waiting import PATIENCE, until

TOKEN = "correct-horse-battery-staple-7f3a"
PROMPTS = [Prompt(f"p{number}", (5 + number, 9, 3)) for number in range(12)]


@contextlib.asynccontextmanager
async def serving(access: ServerAccess | None = None, **options):
    """A server whose engine is `tests.fake_engine`, and the processes that it has started."""
    started: list[EngineProcess] = []

    async def start(environment, log, shared_files):
        started.append(await EngineProcess.start(os.environ, log, shared_files=shared_files, module="tests.fake_engine"))
        return started[-1]

    place = {"host": "127.0.0.1", "port": 0, "device": torch.device("cpu"), **options}
    server = await SampleServer.start(access=access or ServerAccess(), start_process=start, **place)
    try:
        yield server, started
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def engine_at(server: SampleServer, model, tmp_path, *, dtype=torch.float32, access=None, target=None, **options):
    place = EngineServer(target or server.target, access or ClientAccess())
    engine = await VLLMEngine.start(model, VLLMOptions(64, dtype=dtype, **options), eos_token_ids=(2,), folder=tmp_path, server=place)
    try:
        yield engine
    finally:
        await engine.close()


async def write(engine, prompts=PROMPTS, *, seed=4, count=6):
    rollouts = [rollout async for rollout in engine.generate(each(prompts), Sampling(count, seed=seed))]
    return sorted(rollouts, key=lambda rollout: rollout.draw)


def expected(weights, dtype, *, seed=4, count=6):
    sent = {name: tensor.detach().to(dtype).contiguous() for name, tensor in weights}
    known = fingerprint({name: (tuple(tensor.shape), tensor.view(torch.uint8).numpy().tobytes()) for name, tensor in sent.items()})
    return [tuple(written(known, list(one.token_ids), _seed_of(seed, draw), count)) for draw, one in enumerate(PROMPTS)]


async def gone(process: EngineProcess) -> None:
    await until(lambda: process._process.poll() is not None)


# ---------------------------------------------------------------- weights and rollouts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
async def test_every_bit_of_the_weights_arrives_and_each_rollout_is_of_one_version(dtype, tmp_path):
    async with serving() as (server, _):
        model = tiny_llama(hidden=128, layers=3, tied=False)
        async with engine_at(server, model, tmp_path, dtype=dtype) as engine:
            for version in (3, 4):
                await engine.load_weights(model.named_parameters(), version)
                rollouts = await write(engine)
                assert [rollout.token_ids for rollout in rollouts] == expected(model.named_parameters(), dtype)
                assert {rollout.weights_version for rollout in rollouts} == {version}
                with torch.no_grad():
                    model.model.layers[1].mlp.up_proj.weight[3, 5] += 0.5  # one number of all


async def test_weights_larger_than_the_window_go_through_it_in_turns(tmp_path):
    shapes = [(3, 7), (5_000_000,), (1,), (9_000_001,), (3, 3, 3), (6_000_000,)]
    random = np.random.default_rng(0)
    weights = [(f"layer.{place}", torch.from_numpy(random.standard_normal(shape, np.float32))) for place, shape in enumerate(shapes)]
    async with serving() as (server, _), engine_at(server, tiny_llama(), tmp_path) as engine:
        await engine.load_weights(weights, 1)
        assert [rollout.token_ids for rollout in await write(engine)] == expected(weights, torch.float32)


async def test_a_refused_push_is_the_trainers_mistake(tmp_path):
    async with serving() as (server, started), engine_at(server, tiny_llama(), tmp_path) as engine:
        with pytest.raises(ModelError, match="no such parameter"):
            await engine.load_weights([("refused.weight", torch.zeros(3))], 1)
        with pytest.raises(EngineError, match="cut off"):
            await write(engine)
        await gone(started[0])


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm")
async def test_the_real_engine_writes_elsewhere_what_the_trainer_would(tmp_path):
    model = tiny_llama(hidden=128, seed=1, tied=False)  # heads 32 wide: no kernel of vLLM's takes less
    place = {"host": "127.0.0.1", "port": 0, "device": torch.device("cpu"), "access": ServerAccess()}
    server = await SampleServer.start(**place)
    try:
        async with engine_at(server, model, tmp_path, max_batch=4) as engine:
            before = []
            for version in (1, 2):
                await engine.load_weights(model.named_parameters(), version)
                rollouts = await write(engine, count=20)
                assert {rollout.weights_version for rollout in rollouts} == {version}
                assert [rollout.token_ids for rollout in await write(engine, count=20)] == [one.token_ids for one in rollouts]
                figures = AgreementCheck(model, compute_dtype=torch.float32, tokens=1000)(rollouts, version)
                assert figures["engine_difference_max"] < 1e-3
                assert [rollout.token_ids for rollout in rollouts] != before, "the prompts were read anew"
                before = [rollout.token_ids for rollout in rollouts]
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 0.2 * parameter.std() * torch.randn_like(parameter)
    finally:
        await server.stop()


# ---------------------------------------------------------------- losing it


@pytest.mark.parametrize(
    ("first", "message"), [(FAILS, "RuntimeError|exit code 1"), (DIES, "exit code 7"), (HANGS, "has not been heard of for 2 s")]
)
async def test_an_engine_that_fails_dies_or_hangs_is_named_and_the_server_takes_the_next_run(first, message, tmp_path):
    model = tiny_llama()
    async with serving() as (server, started):
        async with engine_at(server, model, tmp_path) as engine:
            await engine.load_weights(model.named_parameters(), 0)
            if first == HANGS:
                engine._client._timeout = 2.0
            with pytest.raises(EngineError, match=message) as caught:
                async with asyncio.timeout(120):
                    await write(engine, [*PROMPTS, Prompt("bad", (first, 1))])
            assert server.target in str(caught.value)
            with pytest.raises(EngineError, match=message):
                await engine.load_weights(model.named_parameters(), 1)
        await gone(started[0])
        async with engine_at(server, model, tmp_path) as engine:
            await engine.load_weights(model.named_parameters(), 1)
            assert len(await write(engine)) == len(PROMPTS)


async def test_a_run_that_goes_takes_its_engine_with_it_and_a_second_one_waits_its_turn(tmp_path):
    model = tiny_llama()
    async with serving() as (server, started):
        async with engine_at(server, model, tmp_path) as engine:
            await engine.load_weights(model.named_parameters(), 0)
            waiting = asyncio.create_task(_open_and_close(server, model, tmp_path))
            await asyncio.sleep(1.2)
            assert not waiting.done()
            assert len(await write(engine)) == len(PROMPTS), "the second one disturbs nothing"
        await gone(started[0])
        async with asyncio.timeout(120):
            await waiting
        assert len(started) == 2


async def _open_and_close(server, model, tmp_path):
    async with engine_at(server, model, tmp_path):
        pass


async def test_a_server_that_stops_is_an_error_for_its_run(tmp_path):
    model = tiny_llama()
    async with serving() as (server, started), engine_at(server, model, tmp_path) as engine:
        await engine.load_weights(model.named_parameters(), 0)
        writing = asyncio.create_task(write(engine, [Prompt("never", (HANGS, 1))]))
        await asyncio.sleep(0.3)
        await server.stop()
        with pytest.raises(EngineError, match="the call to vLLM has ended"):
            async with asyncio.timeout(PATIENCE):
                await writing
        await gone(started[0])


async def test_a_push_that_is_cut_off_ends_and_does_not_hang(tmp_path):
    model = tiny_llama()
    async with serving() as (server, _), engine_at(server, model, tmp_path) as engine:

        def weights():
            yield "a", torch.zeros(12_000_000)
            asyncio.run_coroutine_threadsafe(server.stop(), loop).result()
            yield "b", torch.zeros(12_000_000)

        loop = asyncio.get_running_loop()
        with pytest.raises(EngineError, match=r"cut off|ended"):
            async with asyncio.timeout(120):
                await engine.load_weights(weights(), 1)


# ---------------------------------------------------------------- who is let in


async def test_tls_and_a_token_let_a_run_in_and_nothing_less_does(tmp_path):
    pem = make_certificates(tmp_path)
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "other").write_text("another-token-of-another-team-11")
    tls = ServerTlsConfig(certificate=str(pem / "server.pem"), key=str(pem / "server.key"))
    config = SampleServerConfig(tls=tls, token_file=str(tmp_path / "token"))
    model = tiny_llama()
    async with serving(ServerAccess.from_config(config)) as (server, started):
        port = server.target.rpartition(":")[2]
        ca = ClientTlsConfig(ca=str(pem / "ca.pem"))
        known = ClientAccess.read(ca, str(tmp_path / "token"), None, "rollouts.")
        async with engine_at(server, model, tmp_path, access=known, target=f"grpc://localhost:{port}") as engine:
            await engine.load_weights(model.named_parameters(), 1)
            assert [rollout.token_ids for rollout in await write(engine)] == expected(model.named_parameters(), torch.float32)
        for file in (str(tmp_path / "other"), None):
            stranger = ClientAccess.read(ca, file, None, "rollouts.")
            with pytest.raises(EngineError, match=r"UNAUTHENTICATED.*rollouts.token_file"):
                async with engine_at(server, model, tmp_path, access=stranger, target=f"grpc://localhost:{port}"):
                    pass
        assert len(started) == 1


async def test_certificates_and_tokens_are_renewed_and_a_run_without_its_token_is_ended(tmp_path):
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
    old, new = (make_certificates(tmp_path / name) for name in ("old", "new"))
    for name in ("server.pem", "server.key"):
        shutil.copy(old / name, tmp_path / name)
    (tmp_path / "tokens").write_text(f"{TOKEN}\nanother-token-of-another-team-11\n")
    (tmp_path / "own").write_text(TOKEN)
    tls = ServerTlsConfig(certificate=str(tmp_path / "server.pem"), key=str(tmp_path / "server.key"))
    config = SampleServerConfig(tls=tls, token_file=str(tmp_path / "tokens"))
    model = tiny_llama()
    async with serving(ServerAccess.from_config(config)) as (server, started):
        renewal = AccessRenewal(config, server.renew_access)
        target = f"grpc://localhost:{server.target.rpartition(':')[2]}"

        def knowing(pem: Path) -> ClientAccess:
            return ClientAccess.read(ClientTlsConfig(ca=str(pem / "ca.pem")), str(tmp_path / "own"), None, "rollouts.")

        async with engine_at(server, model, tmp_path, access=knowing(old), target=target) as engine:
            for name in ("server.pem", "server.key"):
                replace_file(tmp_path / name, (new / name).read_bytes())
            assert renewal.read()
            await engine.load_weights(model.named_parameters(), 1)  # a call under way stays
            assert [rollout.token_ids for rollout in await write(engine)] == expected(model.named_parameters(), torch.float32)
            replace_file(tmp_path / "tokens", b"another-token-of-another-team-11\n")
            assert renewal.read()
            await gone(started[0])
            with pytest.raises(EngineError, match=r"UNAUTHENTICATED.*the token of this call is not valid any more"):
                await write(engine)
        replace_file(tmp_path / "tokens", f"{TOKEN}\n".encode())
        assert renewal.read()
        async with engine_at(server, model, tmp_path, access=knowing(new), target=target) as engine:
            await engine.load_weights(model.named_parameters(), 1)


async def test_other_machines_need_tls_and_a_token_on_both_sides(tmp_path):
    with pytest.raises(ConfigError, match=r"host '0\.0\.0\.0' can be reached from other machines"):
        async with serving(host="0.0.0.0"):
            pass
    with pytest.raises(ConfigError, match=r"rollouts target 'grpc://gpu.example:7071' is not on this machine.*rollouts.tls"):
        async with engine_at(None, tiny_llama(), tmp_path, target="grpc://gpu.example:7071"):
            pass
    with pytest.raises(ConfigError, match="rollouts target 'gpu:7071' is not an address"):
        async with engine_at(None, tiny_llama(), tmp_path, target="gpu:7071"):
            pass


def test_a_target_belongs_to_vllm():
    with pytest.raises(ValueError, match="only vllm can write elsewhere"):
        RolloutsConfig(target="grpc://localhost:7071")
    with pytest.raises(ValueError, match="tls and tokens belong to target"):
        RolloutsConfig(engine="vllm", token_env="TOKEN")


def test_only_an_engine_beside_the_run_that_takes_turns_with_the_trainer_sleeps():
    assert RolloutsConfig(engine="vllm", sleep=True, max_staleness=0).sleep
    with pytest.raises(ValueError, match="sleep with engine hf: only a vllm beside the run"):
        RolloutsConfig(sleep=True, max_staleness=0)
    with pytest.raises(ValueError, match="sleep with target grpc://localhost:7071"):
        RolloutsConfig(engine="vllm", target="grpc://localhost:7071", sleep=True, max_staleness=0)
    with pytest.raises(ValueError, match=r"sleep with max_staleness 1.*set max_staleness: 0"):
        RolloutsConfig(engine="vllm", sleep=True)


# ---------------------------------------------------------------- messages


@pytest.mark.parametrize(
    "sent",
    [
        [b"rubbish"],
        [pack_json({"op": "start"})],
        [pack_json({"op": "start", "dtype": "float64", "configuration": "{}", "largest_parameter": 5})],
        [pack_json({"op": "start", "dtype": "float32", "configuration": "{}", "largest_parameter": 5}), pack_json({"op": "system"})],
        [pack_json({"op": "start", "dtype": "float32", "configuration": "{}", "largest_parameter": 5}), b"W" + bytes(40)],
    ],
)
async def test_a_client_that_breaks_the_protocol_is_told_and_nothing_is_left(sent):
    async with serving() as (server, started), grpc.aio.insecure_channel(server.target.removeprefix("grpc://")) as channel:
        call = channel.stream_stream(METHOD)()
        for message in sent:
            await call.write(message)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _read_to_the_end(call)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for process in started:
            await gone(process)


async def _read_to_the_end(call):
    while await call.read() is not grpc.aio.EOF:
        pass
