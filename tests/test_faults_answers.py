"""A teacher that answers wrongly: every wrong answer is found, counted and asked for again, and none reaches the loss."""

from __future__ import annotations

import time

import numpy as np
import pytest

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import TeacherError
from bbopd.rpc.codec import encode_failure, input_sha256
from bbopd.rpc.limits import RefusedError
from bbopd.teachers.backoff import RetryBudget
from bbopd.teachers.fake import FakeBackend
from bbopd.types import SignalSpec
from tests.fault_registry import fault
from tests.fault_server import Answer, FaultyTeacher, Spoil, change, seal, serving, touch
from tests.faults import assert_nothing_lost, connected, make_rollouts, score_all

VOCAB = 97
LARGE_VOCAB = 30_000  # an answer of 60 rows at level full is three messages
TOPK, FULL = SignalSpec("topk", 1.3, 8), SignalSpec("full")
RETRIED = "refuses the answer by name, counts it, asks again"


def put(index, value):
    def how(array: np.ndarray) -> None:
        array[index] = value

    return how


def swap_columns(answer: Answer) -> Answer:
    for name in ("ids", "logprobs"):
        change(name, lambda array: array[:, [1, 0, *range(2, array.shape[1])]])(answer)
    return answer


def drop_a_column(answer: Answer) -> Answer:
    """One id fewer than asked, its mass put into the tail, so that the total is still 1."""
    lost: list[np.ndarray] = []
    change("logprobs", lambda array: lost.append(array[:, -1].astype(np.float32)) or array[:, :-1])(answer)
    change("ids", lambda array: array[:, :-1])(answer)
    return change("log_tail", lambda array: np.logaddexp(array, lost[0]))(answer)


def slip_by_a_row(answer: Answer) -> Answer:
    for name in ("ids", "logprobs", "log_tail"):
        change(name, lambda array: np.roll(array, 1, axis=0))(answer)
    return answer


def lie_about_the_shape(*shape: int) -> Spoil:
    def how(chunk: pb.SignalChunk) -> None:
        del chunk.logprobs.shape[:]
        chunk.logprobs.shape.extend(shape)

    return touch(how)


def at_chunk(number: int, **fields: int) -> Spoil:
    def spoil(answer: Answer) -> Answer:
        for name, value in fields.items():
            setattr(answer[number].chunk, name, getattr(answer[number].chunk, name) + value)
        return answer

    return spoil


TOPK_FAULTS: dict[str, tuple[Spoil, str]] = {
    "NaN": (change("logprobs", put((0, 3), np.nan)), "logprob nan"),
    "+Inf": (change("logprobs", put((0, 0), np.inf)), "logprob inf"),
    "NaN tail": (change("log_tail", put(0, np.nan)), "log_tail nan"),
    "NaN of the token itself": (change("sampled", put(0, np.nan)), "sampled logprob nan"),
    "positive logprob": (change("logprobs", put((0, 0), 0.5)), "logprob 0.5"),
    "−Inf in top-k": (change("logprobs", put((0, -1), -np.inf)), "total probability is not 1|do not belong"),
    "bytes not matching the shape": (lie_about_the_shape(3, 8), "bytes, float16"),
    "a shape of 2⁶⁴ numbers": (lie_about_the_shape(2**32 - 1, 2**32 - 1), "bytes, float16"),
    "ids negative": (change("ids", lambda ids: np.full(ids.shape, -1, np.int32)), "outside the vocabulary"),
    "ids ≥ V": (change("ids", put((0, 2), VOCAB)), f"outside the vocabulary of {VOCAB}: {VOCAB}"),
    "ids duplicated": (change("ids", lambda ids: put((slice(None), 7), ids[:, 6])(ids)), "id given twice"),
    "ids of another type": (change("ids", lambda ids: ids.astype(np.float32)), "has ids float32, expected int32 or uint16"),
    "unsorted": (swap_columns, "out of falling order"),
    "Σp + tail ≠ 1": (change("log_tail", lambda tail: np.log(np.exp(tail) + 0.1)), "total probability is not 1"),
    "fewer than k": (drop_a_column, r"has ids int32 \[\d+, 7\], expected int32 \[\d+, 8\]"),
    "wrong input hash": (touch(lambda chunk: setattr(chunk, "input_sha256", b"\1" * 32)), "about other tokens"),
    "checksum wrong": (touch(lambda chunk: setattr(chunk, "crc32", chunk.crc32 ^ 1)), "damaged on its way"),
    "rows slipped by one": (slip_by_a_row, "do not belong to this rollout"),
    "another level": (touch(lambda chunk: setattr(chunk, "level", pb.LEVEL_SAMPLED)), "has level"),
    "another temperature": (touch(lambda chunk: setattr(chunk, "temperature", 1.0)), "topk at temperature 1.0, asked was topk at 1.3"),
    "a tensor missing": (touch(lambda chunk: (chunk.ClearField("log_tail"), seal(chunk))), "has no log_tail"),
    "no row at all": (touch(lambda chunk: setattr(chunk, "rows", 0)), "brings rows"),
}

FULL_FAULTS: dict[str, tuple[Spoil, str]] = {
    "positions short": (at_chunk(0, total_rows=-1), "brings rows 0..26 of 59"),
    "positions long": (at_chunk(2, rows=9), "brings rows 52..69 of 60"),
    "positions overlapping": (at_chunk(1, position=-1), "brings rows 25..51"),
    "a message twice": (lambda answer: [answer[0], *answer], "brings rows 0..26 of 60, expected from 26"),
    "a message missing": (lambda answer: [answer[0], answer[2]], "brings rows 52..60"),
    "wrong vocabulary": (change("logits", lambda z: np.pad(z, ((0, 0), (0, 1)), constant_values=-1)), "expected float16 or float32"),
    "NaN among logits": (change("logits", put((0, 5), np.nan)), "maximum of 0"),
    "+Inf among logits": (change("logits", put((0, 5), np.inf)), "maximum of 0"),
    "logits not shifted": (change("logits", lambda z: z - np.float16(1)), "maximum of 0"),
}


async def ask(spoil: Spoil, want: SignalSpec, *, times: int | None = 1, count: int = 4):
    """Score a few rollouts with a teacher that spoils its first answers; check them, and give the teacher for its counters."""
    vocab_size, length = (LARGE_VOCAB, 60) if want.level == "full" else (VOCAB, 0)
    backend = FakeBackend(vocab_size)
    rollouts = make_rollouts(count, vocab_size, length=length)
    service = FaultyTeacher(backend, spoil, times)
    async with serving(service) as port, connected(port) as teacher:
        scored = await score_all(teacher, rollouts, want)
        assert_nothing_lost(backend, rollouts, scored, want)
        return teacher, service


@pytest.mark.parametrize("name", TOPK_FAULTS)
async def test_a_bad_answer(name):
    teacher, _ = await ask(TOPK_FAULTS[name][0], TOPK)
    assert (teacher.counters["bad_answers"], teacher.counters["retries"]) == (1, 1)


@pytest.mark.parametrize("name", FULL_FAULTS)
async def test_a_bad_answer_of_several_messages(name):
    teacher, _ = await ask(FULL_FAULTS[name][0], FULL)
    assert (teacher.counters["bad_answers"], teacher.counters["retries"]) == (1, 1)


for _name in TOPK_FAULTS:
    fault(_name, RETRIED)(test_a_bad_answer)
for _name in FULL_FAULTS:
    fault(_name, RETRIED)(test_a_bad_answer_of_several_messages)


@pytest.mark.parametrize("name", ["NaN", "fewer than k", "wrong input hash"])
@fault("the same answer bad every time", "asks three times more, then ends the pass: it names the rollout, the row and the value")
async def test_an_answer_that_is_always_bad(name):
    spoil, message = TOPK_FAULTS[name]
    with pytest.raises(TeacherError, match=rf"failed the same item 4 times.*rollout r0: the answer .*({message}).*0 rollouts were scored"):
        await ask(spoil, TOPK, times=None, count=1)


@fault("unknown request id", "gives the stream up and asks again on another")
async def test_an_answer_to_a_request_never_made():
    teacher, service = await ask(touch(lambda chunk: setattr(chunk, "request_id", chunk.request_id + 10**6)), TOPK)
    assert teacher.counters["bad_answers"] == 1
    assert service.streams == 2


def forget(answer: Answer) -> Answer:
    return []


@pytest.mark.parametrize("times", [1, 4])
@fault("an item dropped without a word", "asks once more on the open stream; where that is answered, asks again for all older ones too")
async def test_items_that_are_dropped_in_silence(times):
    service = FaultyTeacher(FakeBackend(VOCAB), forget, times)
    rollouts = make_rollouts(12, VOCAB)
    async with serving(service) as port, connected(port, timeout=2.0) as teacher:
        scored = await score_all(teacher, rollouts, TOPK)
    assert_nothing_lost(service.backend, rollouts, scored, TOPK)
    assert teacher.counters["asked_again"] == times
    assert (service.streams, len(service.asked)) == (1, 12 + times)


@fault("an item dropped without a word every time", "gives up after `teacher.timeout`, naming it and that it was asked again")
async def test_an_item_that_is_always_dropped():
    service = FaultyTeacher(FakeBackend(VOCAB), lambda answer: [] if service.asked[-1][0] == "r3" else answer, None)
    async with serving(service) as port, connected(port, timeout=1.0) as teacher:
        with pytest.raises(TeacherError, match=r"unanswered: r3 \(asked again in vain on an open stream\)"):
            await score_all(teacher, make_rollouts(6, VOCAB), TOPK)
    assert 1 <= teacher.counters["asked_again"] <= 2


@fault("an answer that comes twice", "takes the first and drops the second")
async def test_an_answer_that_comes_twice():
    teacher, _ = await ask(lambda answer: answer + answer, TOPK, times=None)
    assert not any(teacher.counters.values())


@fault("answers of two rollouts exchanged", "refuses both by the hash of what was scored, asks again")
async def test_answers_exchanged():
    held: list[Answer] = []

    def exchange(answer: Answer) -> Answer:
        held.append(answer)
        if len(held) == 1:
            return []
        first, second = (one[0].chunk.request_id for one in held)
        for one, request_id in zip(held, (second, first), strict=True):
            for response in one:
                response.chunk.request_id = request_id
        return held[0] + held[1]

    teacher, _ = await ask(exchange, FULL, times=2)
    assert teacher.counters["bad_answers"] == 2


@fault("message too large", "gives the stream up without taking it in, asks again on another")
async def test_a_message_too_large():
    teacher, service = await ask(change("sampled", lambda array: np.zeros(17 * 2**18, np.float32)), TOPK)
    assert teacher.counters["reconnects"] == 1
    assert service.streams == 2


@fault("a message that belongs elsewhere in a stream", "gives the stream up and asks again on another")
async def test_a_message_out_of_place():
    def spoil(answer: Answer) -> Answer:
        return [pb.ScoreResponse(accept=pb.StreamAccept(protocol_version=1)), *answer]

    teacher, service = await ask(spoil, TOPK)
    assert (teacher.counters["bad_answers"], service.streams) == (1, 2)
    teacher, service = await ask(lambda answer: [pb.ScoreResponse(), *answer], TOPK)
    assert (teacher.counters["bad_answers"], service.streams) == (1, 2)


@fault("429 with retry-after", "leaves the replica alone for as long as it asks, then goes on; it does not count against the item")
async def test_too_busy_with_retry_after():
    busy = RefusedError("unavailable", "too busy", is_retryable=True, retry_after=0.4)

    def refuse(answer: Answer) -> Answer:
        return [pb.ScoreResponse(failure=encode_failure(answer[0].chunk.request_id, busy))]

    teacher, _ = await ask(refuse, TOPK, times=3)
    assert teacher.counters["retries"] == 3
    assert teacher.counters["bad_answers"] == 0


@fault("weights version changing mid-run", "ends the pass at the first row of other weights, naming both versions")
async def test_weights_that_change_during_a_stream():
    with pytest.raises(TeacherError, match=r"answered with weights version 4, at the start it had 0.*2 rollouts were scored"):
        await ask(_after(2, touch(lambda chunk: setattr(chunk, "weights_version", 4))), TOPK, times=None)


@fault("poison request: its answer always fails", "asks four times, on every replica, then ends the pass naming the rollout")
async def test_a_poison_request():
    broken = RefusedError("internal", "the model failed", is_retryable=True)
    backends = [FakeBackend(VOCAB), FakeBackend(VOCAB)]
    services = [FaultyTeacher(backend, _poison(backend, "r2", broken), None) for backend in backends]
    async with serving(services[0]) as first, serving(services[1]) as second, connected(first, second) as teacher:
        with pytest.raises(TeacherError, match=r"failed the same item 4 times, at last: the model failed.*unanswered: .*r2"):
            await score_all(teacher, make_rollouts(5, VOCAB), TOPK)
    for service in services:
        assert any(rollout_id == "r2" for rollout_id, _ in service.asked), "every replica was tried"
    assert sum(rollout_id == "r2" for service in services for rollout_id, _ in service.asked) == 4


@fault("one replica that answers wrongly", "asks the others instead")
async def test_one_bad_replica():
    backends = [FakeBackend(VOCAB), FakeBackend(VOCAB)]
    bad = FaultyTeacher(backends[0], TOPK_FAULTS["NaN"][0], None)
    rollouts = make_rollouts(60, VOCAB)
    good = FaultyTeacher(backends[1])
    async with serving(bad) as first, serving(good) as second, connected(first, second, inflight_tokens=100) as teacher:
        scored = await score_all(teacher, rollouts, TOPK)
    assert_nothing_lost(backends[0], rollouts, scored, TOPK)
    assert teacher.counters["bad_answers"] >= 1


@fault("a teacher that fails every request", "retries are held to a fifth of the requests, and one a second")
async def test_retries_stay_within_their_budget():
    broken = RefusedError("unavailable", "no", is_retryable=True, retry_after=0.0)
    backend = FakeBackend(VOCAB)

    def refuse(answer: Answer) -> Answer:
        return [pb.ScoreResponse(failure=encode_failure(answer[0].chunk.request_id, broken))]

    service = FaultyTeacher(backend, refuse, None)
    async with serving(service) as port, connected(port, timeout=3.0) as teacher:
        started = time.monotonic()
        with pytest.raises(TeacherError, match=r"has not answered for 3 s \(teacher.timeout\) \(last trouble: .*: no\)"):
            await score_all(teacher, make_rollouts(50, VOCAB), TOPK)
        most = 50 + 20 + 50 / 5 + (time.monotonic() - started) + 1
    assert teacher.counters["retries"] <= most
    assert len(service.asked) <= most


@fault("so many bad answers that retries wait", "what the client puts off itself does not count as silence of the teacher")
async def test_retries_that_wait_for_their_budget_are_no_silence():
    backend, rollouts = FakeBackend(VOCAB), make_rollouts(3, VOCAB)
    service = FaultyTeacher(backend, change("sampled", lambda sampled: np.full_like(sampled, np.nan)))
    async with serving(service) as port, connected(port, timeout=1.5) as teacher:
        teacher._budget = RetryBudget(share=0.0, reserve=0.0, per_second=0.4)  # the one retry waits for 2.5 s
        scored = await score_all(teacher, rollouts, TOPK)
    assert_nothing_lost(backend, rollouts, scored, TOPK)
    assert teacher.counters["bad_answers"] == 1


def _after(count: int, spoil: Spoil) -> Spoil:
    """Leave the first ``count`` answers right."""
    answers = 0

    def spoil_later(answer: Answer) -> Answer:
        nonlocal answers
        answers += 1
        return spoil(answer) if answers > count else answer

    return spoil_later


def _poison(backend: FakeBackend, rollout_id: str, error: RefusedError) -> Spoil:
    poisoned = next(rollout for rollout in make_rollouts(5, VOCAB) if rollout.rollout_id == rollout_id)
    mark = input_sha256(poisoned, TOPK)

    def spoil(answer: Answer) -> Answer:
        chunk = answer[0].chunk
        return [pb.ScoreResponse(failure=encode_failure(chunk.request_id, error))] if chunk.input_sha256 == mark else answer

    return spoil
