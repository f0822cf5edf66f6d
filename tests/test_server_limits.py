"""What one client may take of a server: more is refused before the model hears of it, and who leaves is forgotten."""

from __future__ import annotations

import asyncio
import contextlib
import time

import grpc
import pytest

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.rpc.clients import ClientLimits
from bbopd.rpc.codec import encode_item, encode_prompt, encode_sampling
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec
from tests.fault_registry import fault
from tests.test_server import VOCAB, WANT, next_answer, open_stream, rollout, running, status_of
from tests.waiting import PATIENCE, HeldBackend, arrived, measure, open_calls, until


def failure_of(message):
    assert message.WhichOneof("kind") == "failure", message
    return message.failure


def prompts(count, **sampling):
    return pb.GenerateRequest(
        protocol_version=1,
        prompts=[encode_prompt(number, Prompt(f"p{number}", (1, 2))) for number in range(count)],
        sampling=encode_sampling(Sampling(**{"max_new_tokens": 4, **sampling})),
    )


@fault("more in flight than a client may have", "the item fails, with the time to ask again; the model never hears of it")
async def test_tokens_in_flight_are_counted_over_all_streams_of_a_client_and_given_back():
    backend = HeldBackend(VOCAB)
    async with running(backend, limits=ClientLimits(tokens=27), batch_tokens=18) as (server, _, stub):
        first, second = await open_stream(stub), await open_stream(stub)
        for number in range(2):  # 18 of 27 tokens
            await first.write(encode_item(number, rollout(number), WANT))
        await until(lambda: arrived(server, backend) == 2)
        await second.write(encode_item(1, rollout(1), WANT))  # 27
        await second.write(encode_item(2, rollout(2), WANT))
        refused = failure_of(await next_answer(second))
        assert (refused.request_id, refused.code, refused.retryable) == (2, pb.FAILURE_CODE_OVER_LIMIT, True)
        assert 0.1 <= refused.retry_after_seconds <= 30
        assert refused.message == "rollout r2: this client has 27 tokens in flight and may have 27; send less at a time"
        backend.go_on()
        for call, count in ((first, 2), (second, 1)):
            for _ in range(count):
                assert (await next_answer(call)).WhichOneof("kind") == "chunk"
        await until(lambda: measure(server, "requests_total", level="topk", outcome="ok") == 3)
        await second.write(encode_item(3, rollout(3), WANT))
        assert (await next_answer(second)).chunk.request_id == 3
        assert sum(backend.calls) == 4, "the refused one never reached the model"
        for call in (first, second):
            call.cancel()


async def test_a_single_sequence_beyond_all_a_client_may_have_is_refused_for_good():
    async with running(FakeBackend(VOCAB), limits=ClientLimits(tokens=8)) as (_, _, stub):
        call = await open_stream(stub)
        await call.write(encode_item(1, rollout(1), WANT))
        refused = failure_of(await next_answer(call))
        assert (refused.code, refused.retryable) == (pb.FAILURE_CODE_TOO_LONG, False)
        assert "rollout r1 has 9 tokens, more than the 8 one client may have in flight" in refused.message
        call.cancel()


async def test_bytes_of_requests_in_flight_are_limited():
    backend = HeldBackend(VOCAB)
    async with running(backend, limits=ClientLimits(request_bytes=100)) as (_, _, stub):
        call = await open_stream(stub)
        for number in range(4):  # 36 bytes each
            await call.write(encode_item(number, rollout(number), WANT))
        refused = [failure_of(await next_answer(call)) for _ in range(2)]
        assert [one.request_id for one in refused] == [2, 3]
        assert "72 bytes of requests in flight and may have 100" in refused[0].message
        backend.go_on()
        assert {(await next_answer(call)).chunk.request_id for _ in range(2)} == {0, 1}
        call.cancel()


async def test_tokens_to_write_count_too():
    backend = FakeBackend(VOCAB)
    async with running(backend, limits=ClientLimits(tokens=60)) as (_, _, stub):
        responses = [response async for response in stub.Generate(prompts(4, max_new_tokens=18))]
        refused = [one.failure for one in responses if one.WhichOneof("kind") == "failure"]
        assert [one.code for one in refused] == [pb.FAILURE_CODE_OVER_LIMIT]
        assert sum(backend.calls) == 3
        again = [response async for response in stub.Generate(prompts(3, max_new_tokens=18))]
        assert [one.WhichOneof("kind") for one in again] == ["completion"] * 3, "all of it was given back"


@pytest.mark.parametrize("kind", ["score", "generate"])
async def test_calls_beyond_a_clients_share_are_refused_with_the_time_to_ask_again(kind):
    backend = HeldBackend(VOCAB)
    async with running(backend, limits=ClientLimits(streams=2, calls=2)) as (server, _, stub):

        async def begin(count):
            call = await open_stream(stub) if kind == "score" else stub.Generate(prompts(1))
            await until(lambda: open_calls(server, kind) == count)
            return call

        calls = [await begin(count) for count in (1, 2)]
        third = stub.Score() if kind == "score" else stub.Generate(prompts(1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asyncio.wait_for(third.read(), PATIENCE)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert refused.value.details() == f"this client already has 2 {kind} calls open, as many as it may"
        assert ("grpc-retry-pushback-ms", "1000") in tuple(refused.value.trailing_metadata())
        calls[0].cancel()
        await until(lambda: open_calls(server, kind) == 1)
        calls.append(await begin(2))
        backend.go_on()
        for call in calls:
            call.cancel()


@fault("a request too large", "its call ends; the others go on")
async def test_a_message_beyond_the_limit_ends_its_call_alone():
    async with running(FakeBackend(VOCAB)) as (_, channel, stub):
        other = await open_stream(stub)
        call = channel.stream_stream("/bbopd.v1.TeacherService/Score")()
        await call.write(b"\0" * (17 * 2**20))
        code, details = await status_of(call)
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "larger than max" in details
        await other.write(encode_item(1, rollout(1), WANT))
        assert (await next_answer(other)).chunk.rows == 6
        other.cancel()


@fault("a client that sends nonsense and reads nothing", "its stream ends once 65,536 answers wait")
async def test_who_sends_nonsense_and_reads_nothing_is_stopped():
    backend = FakeBackend(VOCAB)
    small_windows = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536)]
    async with (
        running(backend, limits=ClientLimits(items=500)) as (server, _, _),
        grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options=small_windows) as channel,
    ):
        call = await open_stream(teacher_pb2_grpc.TeacherServiceStub(channel))
        nothing = pb.ScoreItem(want=pb.SignalSpec(level=pb.LEVEL_SAMPLED, temperature=1.0), rollout_id="x" * 4000)
        sent = 0

        async def write():
            nonlocal sent
            with contextlib.suppress(asyncio.InvalidStateError, grpc.aio.AioRpcError):
                for number in range(20_000):  # 80 MB
                    nothing.request_id = number
                    await call.write(pb.ScoreRequest(item=nothing))
                    sent += 1

        writing, before = asyncio.create_task(write()), -1
        (stream,) = server._service._calls
        await until(stream._reader.done)
        while sent != before:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < 5000, "the server reads no more once 500 answers wait to be taken"
        while not isinstance(message := await next_answer_or_status(call), grpc.StatusCode):
            assert message is not grpc.aio.EOF
        await writing
        assert backend.calls == []
        value = server.observer.registry.get_sample_value
        assert value("bbopd_refusals_total", {"reason": "protocol"}) == 1
        assert value("bbopd_open_calls", {"kind": "score"}) == 0


async def next_answer_or_status(call):
    try:
        return await next_answer(call)
    except grpc.aio.AioRpcError as error:
        return error.code()


@pytest.mark.parametrize("bad", ["two\nlines", "x" * 201, "\x1b[31m"])
async def test_names_that_would_spoil_a_log_are_refused(bad):
    async with running(FakeBackend(VOCAB)) as (_, _, stub):
        call = await open_stream(stub)
        request = encode_item(1, rollout(1), WANT)
        request.item.rollout_id = bad
        await call.write(request)
        refused = failure_of(await next_answer(call))
        assert refused.code == pb.FAILURE_CODE_INVALID
        assert refused.message.startswith("rollout_id ")
        assert refused.message.isprintable()
        call.cancel()


# ---------------------------------------------------------------- clients that are slow, or gone


@fault("client gone", "what it waited for leaves the queue; the batch that runs is the last")
async def test_a_client_that_has_gone_is_not_worked_for_any_more():
    backend = HeldBackend(VOCAB)
    async with running(backend, batch_tokens=18) as (server, _, stub):
        gone = await open_stream(stub)
        for number in range(100):
            await gone.write(encode_item(number, rollout(number), WANT))
        await until(lambda: backend.calls and arrived(server, backend) == 100)
        gone.cancel()
        await until(lambda: open_calls(server, "score") == 0)
        (running_then,) = backend.calls
        here = await open_stream(stub)
        await here.write(encode_item(1, rollout(1), WANT))
        backend.go_on()
        await next_answer(here)
        assert backend.calls == [running_then, 1], "the batch that was running, and the one just asked for"
        value = server.observer.registry.get_sample_value
        assert value("bbopd_queued_items") == value("bbopd_queued_tokens") == 0
        assert value("bbopd_requests_total", {"level": "topk", "outcome": "dropped"}) == 100
        here.cancel()


@fault("a client that takes no answers", "it is passed over at `max_inflight_bytes`; nobody else waits")
@pytest.mark.parametrize("reads", [False, True], ids=["no credit", "credit, but nothing is read"])
async def test_a_slow_client_costs_a_bounded_amount_of_memory(reads):
    backend = FakeBackend(20_000)
    item = Rollout("r", Prompt("p", (1,)), tuple(range(50)))  # 2 MB an answer, 200 MB in all
    async with running(backend, batch_tokens=51, max_inflight_bytes=10_000_000) as (server, _, stub):
        call = await open_stream(stub, credit=2**40 if reads else 1)
        for number in range(100):
            await call.write(encode_item(number, item, SignalSpec("full")))
        previous, deadline = -1, time.monotonic() + 20
        while len(backend.calls) != previous and time.monotonic() < deadline:
            previous = len(backend.calls)
            await asyncio.sleep(0.5)
        assert server.observer.registry.get_sample_value("bbopd_inflight_answer_bytes") <= 10_000_000
        assert len(backend.calls) <= 5 + 8, "10 MB wait in the server, and what little the transport holds"
        quick = await open_stream(stub)
        await quick.write(encode_item(1, rollout(1), WANT))
        assert (await next_answer(quick)).chunk.rows == 6, "nobody else waits for it"
        for one in (call, quick):
            one.cancel()


# ---------------------------------------------------------------- asked again


async def ask(stub, item, want, replay_id, number=1, resume_from=0):
    call = await open_stream(stub)
    request = encode_item(number, item, want, resume_from)
    request.item.replay_id = replay_id
    await call.write(request)
    answer = await next_answer(call)
    call.cancel()
    return answer


@fault(
    "duplicate id with another body", "the item fails: a replay_id stands for one question; with the same body the same answer comes again"
)
async def test_a_question_asked_again_by_name_is_answered_from_memory_and_another_one_refused():
    backend = FakeBackend(VOCAB)
    async with running(backend) as (server, _, stub):
        first = await ask(stub, rollout(1), WANT, "q-1")
        again = await ask(stub, rollout(1), WANT, "q-1", number=77)
        assert (backend.calls, again.chunk.request_id) == ([1], 77)
        first.chunk.request_id = 77
        assert again == first
        resumed = await ask(stub, rollout(1), WANT, "q-1", resume_from=4)
        assert (resumed.chunk.position, resumed.chunk.rows, backend.calls) == (4, 2, [1])
        for item, want in ((rollout(2), WANT), (rollout(1), SignalSpec("topk", 2.0, 4)), (rollout(1), SignalSpec("topk", 1.0, 5))):
            refused = failure_of(await ask(stub, item, want, "q-1"))
            assert (refused.code, refused.retryable) == (pb.FAILURE_CODE_MISMATCH, False)
        assert backend.calls == [1]
        await ask(stub, rollout(1), WANT, "q-2")
        await ask(stub, rollout(1), WANT, "")
        assert backend.calls == [1, 1, 1], "under another name, or none, it is another question"
        assert server.observer.registry.get_sample_value("bbopd_replayed_total", {"level": "topk"}) == 2


async def test_an_answer_whose_client_left_is_there_when_it_comes_back():
    backend = HeldBackend(VOCAB)
    async with running(backend) as (server, _, stub):
        call = await open_stream(stub)
        request = encode_item(1, rollout(1), WANT)
        request.item.replay_id = "paid"
        await call.write(request)
        await until(lambda: backend.calls)
        call.cancel()
        await until(lambda: open_calls(server, "score") == 0)
        backend.go_on()
        await until(lambda: measure(server, "batch_items_count") == 1)
        assert (await ask(stub, rollout(1), WANT, "paid")).chunk.rows == 6
        assert backend.calls == [1]


async def test_written_answers_are_kept_too_and_failures_are_not():
    backend = FakeBackend(VOCAB, failures={"r1": 1})
    async with running(backend) as (_, _, stub):
        request = prompts(2)
        for number, prompt in enumerate(request.prompts):
            prompt.replay_id = f"w{number}"
        first, again = [[one async for one in stub.Generate(request)] for _ in range(2)]
        assert sorted(map(str, first)) == sorted(map(str, again))
        assert sum(backend.calls) == 2
        request.sampling.seed = 9
        assert [one.failure.code async for one in stub.Generate(request)] == [pb.FAILURE_CODE_MISMATCH] * 2
        assert failure_of(await ask(stub, rollout(1), WANT, "broken")).code == pb.FAILURE_CODE_INTERNAL
        assert (await ask(stub, rollout(1), WANT, "broken")).chunk.rows == 6


async def test_what_is_kept_is_bounded_and_the_oldest_goes_first():
    backend = FakeBackend(VOCAB)
    async with running(backend, replay_bytes=2500) as (_, _, stub):
        for name in ("a", "b", "c", "d", "a", "d"):
            await ask(stub, rollout(1), WANT, name)
        assert len(backend.calls) == 5, "a was forgotten for d, and d was still there"
