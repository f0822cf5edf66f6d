"""The server as any client sees it, through raw messages: nothing here relies on the client's own good manners."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import ConfigError
from bbopd.rpc.answers import SignalAssembler, payload_bytes
from bbopd.rpc.clients import ClientLimits
from bbopd.rpc.codec import decode_info, encode_item, encode_prompt, encode_sampling
from bbopd.rpc.server import SERVICE, start_server
from bbopd.rpc.tensors import decode_tensor, encode_tensor
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from tests.waiting import PATIENCE, HeldBackend, arrived, until

VOCAB = 50
WANT = SignalSpec("topk", 1.0, 4)


def rollout(number: int, length: int = 6) -> Rollout:
    random = np.random.default_rng(number)
    return Rollout(
        f"r{number}", Prompt("p", tuple(random.integers(0, VOCAB, 3).tolist())), tuple(random.integers(0, VOCAB, length).tolist())
    )


@contextlib.asynccontextmanager
async def running(backend, **options):
    server = await start_server(backend, **options)
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, channel, teacher_pb2_grpc.TeacherServiceStub(channel)
    finally:
        await server.stop(0.2)


async def open_stream(stub, credit: int = 2**26):
    call = stub.Score()
    await call.write(pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1, answer_credit_bytes=credit)))
    first = await asyncio.wait_for(call.read(), PATIENCE)
    assert first.accept.protocol_version == 1
    assert first.accept.request_credit_bytes > 0
    return call


async def next_answer(call):
    """The next message that is no credit."""
    while True:
        message = await asyncio.wait_for(call.read(), PATIENCE)
        if message is grpc.aio.EOF or message.WhichOneof("kind") != "credit":
            return message


async def status_of(call):
    try:
        while await asyncio.wait_for(call.read(), PATIENCE) is not grpc.aio.EOF:
            pass
    except grpc.aio.AioRpcError as error:
        return error.code(), error.details()
    return await call.code(), ""


async def test_info_and_health_are_served_and_reflection_is_not():
    backend = FakeBackend(VOCAB, vocab_sha256="ab" * 32)
    async with running(backend) as (_, channel, stub):
        response = await stub.GetInfo(pb.GetInfoRequest(protocol_min=1, protocol_max=1))
        assert (response.protocol_min, response.protocol_max) == (1, 1)
        assert decode_info(response.info) == dataclasses.replace(backend.info, max_request_tokens=262_144)
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        reflect = channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await reflect(b"")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_port_that_is_taken():
    async with running(FakeBackend(VOCAB)) as (server, _, _):
        with pytest.raises(ConfigError, match=f"cannot serve on 127.0.0.1:{server.port}: the port is taken"):
            await start_server(FakeBackend(VOCAB), port=server.port)


def with_ids(ids, prompt_tokens=3):
    def change(item):
        item.token_ids.CopyFrom(encode_tensor(np.array(ids, np.int32)))
        item.prompt_tokens = prompt_tokens

    return change


def with_want(**fields):
    def change(item):
        for name, value in fields.items():
            setattr(item.want, name, value)

    return change


def candidates(ids):
    def change(item):
        item.want.level, item.want.top_k = pb.LEVEL_CANDIDATES, 0
        item.candidate_ids.CopyFrom(encode_tensor(np.array(ids, np.int32)))

    return change


BAD_ITEMS = [
    (with_ids([1, 2, 3, VOCAB]), pb.FAILURE_CODE_INVALID, f"token id {VOCAB}, outside"),
    (with_ids([1, 2, 3, -1]), pb.FAILURE_CODE_INVALID, "token id -1"),
    (with_ids([1] * 33), pb.FAILURE_CODE_TOO_LONG, "33 tokens, more than"),
    (with_ids([1, 2, 3]), pb.FAILURE_CODE_INVALID, "no response tokens"),
    (with_ids([1, 2, 3], 0), pb.FAILURE_CODE_INVALID, "no prompt"),
    (with_ids([1, 2, 3], 9), pb.FAILURE_CODE_INVALID, "prompt_tokens 9"),
    (with_ids([[1, 2], [3, 4]]), pb.FAILURE_CODE_INVALID, "token_ids is int32"),
    (with_want(top_k=17), pb.FAILURE_CODE_NOT_OFFERED, r"top_k 17 is outside 1..16"),
    (with_want(temperature=0.0), pb.FAILURE_CODE_INVALID, "temperature 0.0"),
    (with_want(temperature=float("nan")), pb.FAILURE_CODE_INVALID, "temperature nan"),
    (with_want(temperature=1e9), pb.FAILURE_CODE_NOT_OFFERED, "temperature 1000000000.0 is outside"),
    (with_want(level=pb.LEVEL_FULL, top_k=0), pb.FAILURE_CODE_NOT_OFFERED, "does not offer level 'full'"),
    (with_want(level=pb.LEVEL_UNSPECIFIED), pb.FAILURE_CODE_INVALID, "level 0"),
    (with_want(level=pb.LEVEL_TEXT, top_k=0), pb.FAILURE_CODE_INVALID, "level 'text' has no signal"),
    (with_want(level=pb.LEVEL_SAMPLED), pb.FAILURE_CODE_INVALID, "top_k 4 with level 'sampled'"),
    (candidates([[1, 2]]), pb.FAILURE_CODE_INVALID, r"candidate_ids \[1, 2\]"),
    (candidates([[1, 1]] * 6), pb.FAILURE_CODE_INVALID, "candidate id twice at response token 0"),
    (candidates([[1, VOCAB]] * 6), pb.FAILURE_CODE_INVALID, f"candidate ids 1..{VOCAB}"),
    (candidates([[1, -2]] * 6), pb.FAILURE_CODE_INVALID, "candidate ids -2..1"),
]


async def test_every_limit_is_kept_before_the_model_sees_anything_and_an_item_fails_alone():
    backend = FakeBackend(VOCAB, levels=("topk", "candidates", "sampled", "text"), max_top_k=16, max_sequence_tokens=32)
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub)
        for number, (change, code, message) in enumerate(BAD_ITEMS):
            request = encode_item(number, rollout(number), WANT)
            change(request.item)
            await call.write(request)
            failure = (await next_answer(call)).failure
            assert (failure.request_id, failure.code, failure.retryable) == (number, code, False)
            assert pytest.raises(AssertionError, match=message).matches(AssertionError(failure.message)), failure.message
        assert backend.calls == []
        await call.write(encode_item(99, rollout(99), WANT))
        answer = await next_answer(call)
        assert answer.chunk.request_id == 99
        await call.done_writing()
        assert await status_of(call) == (grpc.StatusCode.OK, "")


async def test_a_batch_that_fails_is_run_item_by_item():
    backend = FakeBackend(VOCAB, failures={"r2": 1000}, nan_ids={"r4"})
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub)
        for number in range(6):
            await call.write(encode_item(number, rollout(number), WANT))
        await call.done_writing()
        outcome = {}
        while (message := await next_answer(call)) is not grpc.aio.EOF:
            kind = message.WhichOneof("kind")
            outcome[getattr(message, kind).request_id] = (kind, message.failure.code, message.failure.retryable)
    good = ("chunk", 0, False)
    assert outcome == {
        0: good,
        1: good,
        2: ("failure", pb.FAILURE_CODE_INTERNAL, True),
        3: good,
        4: ("failure", pb.FAILURE_CODE_BAD_SIGNAL, False),
        5: good,
    }
    assert backend.calls[0] > 1


async def test_items_of_several_clients_share_a_batch_and_none_is_starved():
    batches: list[list[str]] = []

    class Recorder(HeldBackend):
        def score(self, rollouts, want):
            batches.append([one.rollout_id for one in rollouts])
            return super().score(rollouts, want)

    backend = Recorder(VOCAB)
    async with running(backend, batch_tokens=90) as (server, _, stub):
        greedy, modest = await open_stream(stub), await open_stream(stub)
        for number in range(60):
            await greedy.write(encode_item(number, rollout(number), WANT))
        await until(lambda: backend.calls and arrived(server, backend) == 60)
        await modest.write(encode_item(7, rollout(99), WANT))
        await until(lambda: arrived(server, backend) == 61)
        backend.go_on()
        await next_answer(modest)
        assert "r99" in batches[1], "the second client's only item went into the next batch"
        assert len(batches[1]) == 10, "ten items of nine tokens are one batch of 90"
        for call in (greedy, modest):
            call.cancel()


async def test_items_that_want_different_things_are_not_mixed():
    backend = FakeBackend(VOCAB)
    wants = [SignalSpec("topk", 1.0, 4), SignalSpec("topk", 2.0, 4), SignalSpec("sampled")]
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub)
        for number in range(9):
            await call.write(encode_item(number, rollout(number), wants[number % 3]))
        for _ in range(9):
            chunk = (await next_answer(call)).chunk
            assembler = SignalAssembler(rollout(chunk.request_id), wants[chunk.request_id % 3], VOCAB, "request")
            assembler.add(chunk)
            expected = FakeBackend(VOCAB).score([rollout(chunk.request_id)], wants[chunk.request_id % 3])[0]
            np.testing.assert_array_equal(assembler.signal().sampled, expected.sampled)
        call.cancel()


async def test_nothing_is_sent_without_credit():
    backend = FakeBackend(20_000)
    item = Rollout("r", Prompt("p", (1,)), tuple(range(100)))  # 4 MB at level full, in chunks of 1.5 MiB
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub, credit=1)
        await call.write(encode_item(1, item, SignalSpec("full")))
        assembler = SignalAssembler(item, SignalSpec("full"), 20_000, "request 1")
        while not assembler.is_complete:
            chunk = (await next_answer(call)).chunk
            assembler.add(chunk)
            if assembler.is_complete:
                break
            reading = asyncio.ensure_future(next_answer(call))
            await asyncio.sleep(0.1)
            assert not reading.done(), "a balance at or below zero sends nothing"
            await call.write(pb.ScoreRequest(credit=pb.Credit(bytes=payload_bytes(chunk))))
            assembler.add((await reading).chunk)
            await call.write(pb.ScoreRequest(credit=pb.Credit(bytes=2**22)))
        call.cancel()


async def test_an_answer_is_resumed_from_the_row_asked_for():
    item = Rollout("r", Prompt("p", (1,)), tuple(range(100)))
    backend = FakeBackend(20_000)
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub)
        await call.write(encode_item(1, item, SignalSpec("full"), resume_from=70))
        chunk = (await next_answer(call)).chunk
        assert (chunk.position, chunk.rows, chunk.total_rows) == (70, 30, 100)
        expected = backend.score([item], SignalSpec("full"))[0].logits[70:]
        np.testing.assert_array_equal(decode_tensor(chunk.logits, "logits"), expected)
        call.cancel()


async def test_answers_that_nobody_takes_stop_the_model():
    backend = FakeBackend(20_000)
    item = Rollout("r", Prompt("p", (1,)), tuple(range(50)))  # 2 MB each
    async with running(backend, batch_tokens=51, max_inflight_bytes=5_000_000) as (_, _, stub):
        call = await open_stream(stub, credit=1)
        for number in range(10):
            await call.write(encode_item(number, item, SignalSpec("full")))
        await until(lambda: len(backend.calls) == 2)
        await asyncio.sleep(0.3)
        assert len(backend.calls) == 2
        await call.write(pb.ScoreRequest(credit=pb.Credit(bytes=2**30)))
        rows = 0
        while rows < 500:
            rows += (await next_answer(call)).chunk.rows
        assert len(backend.calls) == 10
        call.cancel()


async def test_requests_are_held_back_by_credit_too():
    item = Rollout("r", Prompt("p", (1,)), (2,) * 50_000)  # 200 kB
    limits = ClientLimits(tokens=10**8)
    backend = HeldBackend(4, max_sequence_tokens=10**6)
    async with running(backend, limits=limits) as (_, _, stub):
        call = await open_stream(stub)
        for number in range(44):  # 8.8 MB, where the window is 8 MiB
            await call.write(encode_item(number, item, SignalSpec("sampled")))
        assert await status_of(call) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "an item was sent without credit for it")
        backend.go_on()
    async with running(FakeBackend(4, max_sequence_tokens=10**6), limits=limits) as (_, _, stub):
        call = stub.Score()
        await call.write(pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1, answer_credit_bytes=2**30)))
        balance, sent, rows = (await call.read()).accept.request_credit_bytes, 0, 0
        while rows < 60 * 50_000:
            while balance > 0 and sent < 60:
                request = encode_item(sent, item, SignalSpec("sampled"))
                balance -= len(request.item.token_ids.data)
                await call.write(request)
                sent += 1
            message = await asyncio.wait_for(call.read(), PATIENCE)
            balance += message.credit.bytes
            rows += message.chunk.rows
        call.cancel()


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        ([encode_item(1, rollout(1), WANT)], grpc.StatusCode.INVALID_ARGUMENT),
        ([pb.ScoreRequest(open=pb.StreamOpen(protocol_version=2))], grpc.StatusCode.FAILED_PRECONDITION),
        ([pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1))] * 2, grpc.StatusCode.INVALID_ARGUMENT),
        (
            [pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1)), *[encode_item(1, rollout(1), WANT)] * 2],
            grpc.StatusCode.INVALID_ARGUMENT,
        ),
    ],
)
async def test_who_breaks_the_protocol_loses_the_stream_but_not_the_teacher(messages, code):
    async with running(FakeBackend(VOCAB)) as (_, _, stub):
        call = stub.Score()
        for message in messages:
            await call.write(message)
        assert (await status_of(call))[0] is code
        call = await open_stream(stub)
        await call.write(encode_item(1, rollout(1), WANT))
        assert (await next_answer(call)).chunk.rows == 6
        call.cancel()


async def test_stopping_finishes_what_was_taken():
    backend = HeldBackend(VOCAB)
    async with running(backend, batch_tokens=20) as (server, _, stub):
        call = await open_stream(stub)
        for number in range(6):
            await call.write(encode_item(number, rollout(number), WANT))
        await until(lambda: arrived(server, backend) == 6)
        stopping = asyncio.create_task(server.stop(PATIENCE))
        await asyncio.sleep(0.05)
        backend.go_on()
        answered = set()
        while len(answered) < 6:
            answered.add((await next_answer(call)).chunk.request_id)
        assert answered == set(range(6))
        assert await status_of(call) == (grpc.StatusCode.UNAVAILABLE, "the teacher is shutting down")
        await asyncio.wait_for(stopping, PATIENCE)


async def test_completions_and_their_failures_come_one_by_one():
    backend = FakeBackend(VOCAB)
    sampling = Sampling(4, seed=1)
    prompts = [Prompt("good", (1, 2)), Prompt("bad", (VOCAB,)), Prompt("also", (3,))]
    request = pb.GenerateRequest(
        protocol_version=1, prompts=[encode_prompt(n, prompt) for n, prompt in enumerate(prompts)], sampling=encode_sampling(sampling)
    )
    async with running(backend) as (_, _, stub):
        responses = [response async for response in stub.Generate(request)]
        texts = {r.completion.request_id: r.completion.text for r in responses if r.WhichOneof("kind") == "completion"}
        expected = FakeBackend(VOCAB).generate([prompts[0], prompts[2]], sampling)
        assert texts == {0: expected[0].text, 2: expected[1].text}
        (failure,) = (r.failure for r in responses if r.WhichOneof("kind") == "failure")
        assert (failure.request_id, failure.code) == (1, pb.FAILURE_CODE_INVALID)
        request.sampling.temperature = 0
        with pytest.raises(grpc.aio.AioRpcError, match=r"sampling.temperature 0.0 cannot be used"):
            await stub.Generate(request).read()
