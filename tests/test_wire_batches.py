"""Several messages in one, both ways: they mean what they would mean one by one, and nobody gets a batch who does not take them."""

from __future__ import annotations

import asyncio

import grpc
import pytest

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.answers import SignalAssembler, SignalCutter, payload_bytes
from bbopd.rpc.batches import BATCH_BYTES, BATCH_MESSAGES, parts_of
from bbopd.rpc.codec import decode_item, encode_item
from bbopd.teachers.fake import FakeBackend
from bbopd.types import SignalSpec
from tests.fault_registry import fault
from tests.fault_server import FaultyTeacher, messages, serving
from tests.faults import assert_nothing_lost, connected, make_rollouts, score_all
from tests.test_server import running, status_of
from tests.waiting import PATIENCE

VOCAB = 97
WANT = SignalSpec("topk", 1.0, 8)


def batch(parts):
    message = pb.ScoreRequest()
    for part in parts:
        message.batch.messages.add().CopyFrom(part)
    return message


def opening(credit: int = 2**26, takes_batches: bool = True) -> pb.ScoreRequest:
    return pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1, answer_credit_bytes=credit, takes_batches=takes_batches))


async def open_stream(stub, **options):
    call = stub.Score()
    await call.write(opening(**options))
    assert (await asyncio.wait_for(call.read(), PATIENCE)).accept.takes_batches
    return call


async def read_all(call, assemblers, failures):
    """Read until every request is answered; the sizes of the messages, in answers."""
    sizes = []
    while any(not one.is_complete for one in assemblers.values()):
        parts = parts_of(await asyncio.wait_for(call.read(), PATIENCE))
        for part in parts:
            if part.WhichOneof("kind") == "failure":
                failures[part.failure.request_id] = part.failure.code
            elif part.WhichOneof("kind") == "chunk":
                assemblers[part.chunk.request_id].add(part.chunk)
        assert sum(payload_bytes(part.chunk) for part in parts) <= BATCH_BYTES
        sizes.append(len(parts))
    return sizes


async def test_what_is_ready_together_travels_together_and_an_item_fails_alone():
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(40, VOCAB)
    async with running(backend) as (_, _, stub):
        call = await open_stream(stub)
        bad = encode_item(99, rollouts[0], WANT)
        bad.item.prompt_tokens = 0
        asked = [encode_item(number, rollout, WANT) for number, rollout in enumerate(rollouts)]
        await call.write(batch([*asked[:20], bad, pb.ScoreRequest(credit=pb.Credit(bytes=5)), *asked[20:]]))
        assemblers = {number: SignalAssembler(rollout, WANT, VOCAB, "it") for number, rollout in enumerate(rollouts)}
        failures: dict[int, int] = {}
        sizes = await read_all(call, assemblers, failures)
        assert failures == {99: pb.FAILURE_CODE_INVALID}
        assert max(sizes) > 10
        for number, rollout in enumerate(rollouts):
            expected = backend.score([rollout], WANT)[0]
            assert (assemblers[number].signal().ids == expected.ids).all()


async def test_credit_holds_within_a_batch():
    rollouts = make_rollouts(9, VOCAB, length=10)
    size = 10 * (2 * 8 + 2 * 8 + 8)  # ids, logprobs, tail and own
    async with running(FakeBackend(VOCAB)) as (_, _, stub):
        call = await open_stream(stub, credit=2 * size + 1)
        await call.write(batch(encode_item(number, rollout, WANT) for number, rollout in enumerate(rollouts)))
        assert [part.chunk.request_id for part in parts_of(await call.read())] == [0, 1, 2]
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(reading := asyncio.ensure_future(call.read())), 0.2)
        await call.write(batch([pb.ScoreRequest(credit=pb.Credit(bytes=size))] * 2))
        assert [part.chunk.request_id for part in parts_of(await reading)] == [3, 4]


async def test_who_does_not_take_batches_gets_none():
    rollouts = make_rollouts(9, VOCAB)
    async with running(FakeBackend(VOCAB)) as (_, _, stub):
        call = await open_stream(stub, takes_batches=False)
        await call.write(batch(encode_item(number, rollout, WANT) for number, rollout in enumerate(rollouts)))
        kinds = {(await asyncio.wait_for(call.read(), PATIENCE)).WhichOneof("kind") for _ in rollouts}
        assert kinds == {"chunk"}


@fault("a client that sends a batch within a batch, or too large a one", "its stream ends: `INVALID_ARGUMENT`")
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([opening()], "open was sent where"),
        ([pb.ScoreRequest(batch=pb.ScoreRequestBatch())], "batch was sent where"),
        ([pb.ScoreRequest()], "nothing was sent where"),
        ([pb.ScoreRequest(credit=pb.Credit(bytes=1))] * (BATCH_MESSAGES + 1), f"a batch of {BATCH_MESSAGES + 1} messages"),
    ],
    ids=["open", "batch", "nothing", "too many"],
)
async def test_a_batch_that_is_none_ends_the_stream(parts, message):
    async with running(FakeBackend(VOCAB)) as (_, _, stub):
        call = await open_stream(stub)
        await call.write(batch(parts))
        code, details = await status_of(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert message in details


class Batching(FaultyTeacher):
    """Takes and sends batches: answers to all of one message go back together, after ``spoil_batch``."""

    def __init__(self, backend, spoil_batch=lambda parts: parts, takes_batches=True):
        super().__init__(backend)
        self.spoil_batch, self.takes_batches = spoil_batch, takes_batches
        self.heard: list[int] = []

    async def Score(self, requests, context):  # noqa: N802
        self.streams += 1
        yield pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=1, request_credit_bytes=2**20, takes_batches=self.takes_batches))
        async for request in requests:
            parts = parts_of(request)
            if request.WhichOneof("kind") != "open":
                self.heard.append(len(parts) if request.WhichOneof("kind") == "batch" else 0)
            answer = []
            for part in parts:
                if part.WhichOneof("kind") == "item":
                    answer += self.answer(part.item)
            if answer and self.takes_batches:
                yield pb.ScoreResponse(batch=pb.ScoreResponseBatch(messages=self.spoil_batch(answer)))
                continue
            for part in answer:
                yield part

    def answer(self, item):
        rollout, want, resume_from = decode_item(item)
        self.asked.append((rollout.rollout_id, resume_from))
        signal = self.backend.score([rollout], want)[0]
        return messages(SignalCutter(item.request_id, rollout, signal, VOCAB, resume_from))


async def ask(service, count: int = 60):
    rollouts = make_rollouts(count, VOCAB)
    async with serving(service) as port, connected(port) as teacher:
        scored = await score_all(teacher, rollouts, WANT)
    assert_nothing_lost(service.backend, rollouts, scored, WANT)
    return teacher


async def test_the_client_sends_batches_to_who_takes_them_alone():
    service = Batching(FakeBackend(VOCAB))
    await ask(service)
    assert max(service.heard) > 10
    plain = Batching(FakeBackend(VOCAB), takes_batches=False)
    await ask(plain)
    assert set(plain.heard) == {0}


def spoil_once(how):
    """Spoil the first batch alone."""
    left = [how]
    return lambda parts: left.pop()(parts) if left else parts


@fault("one bad answer among others in a message", "takes the others, counts the bad one and asks it again")
async def test_one_bad_answer_of_a_batch_is_asked_again_and_no_other():
    def damage(parts):
        parts[len(parts) // 2].chunk.crc32 ^= 1
        return parts

    service = Batching(FakeBackend(VOCAB), spoil_once(damage))
    teacher = await ask(service)
    assert (teacher.counters["bad_answers"], teacher.counters["reconnects"]) == (1, 0)
    assert len(service.asked) == 61


@fault("a batch within a batch, too large a one, or one with what belongs elsewhere", "gives the stream up and asks again on another")
@pytest.mark.parametrize(
    "how",
    [
        lambda parts: [pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=1)), *parts],
        lambda parts: [pb.ScoreResponse(batch=pb.ScoreResponseBatch()), *parts],
        lambda parts: [pb.ScoreResponse(credit=pb.Credit(bytes=1))] * (BATCH_MESSAGES + 1),
    ],
    ids=["accept", "batch", "too many"],
)
async def test_a_batch_that_is_none_is_a_violation_and_loses_nothing(how):
    service = Batching(FakeBackend(VOCAB), spoil_once(how))
    teacher = await ask(service)
    assert (teacher.counters["bad_answers"], service.streams) == (1, 2)
