"""Random, mutated and hand-made messages against every decoder: only the documented errors come out, and nothing grows beyond the message.

``make test`` runs a few hundred cases, ``make fuzz`` over a hundred thousand.
"""

from __future__ import annotations

import functools
import math
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import BadAnswerError
from bbopd.rpc import codec
from bbopd.rpc.answers import SignalAssembler, SignalCutter, payload_bytes
from bbopd.rpc.batches import BATCH_MESSAGES, add_part, joined, parts_of
from bbopd.rpc.limits import RefusedError, check_prompt, check_rollout, check_sampling, check_want
from bbopd.rpc.signals import MASS_TOLERANCE
from bbopd.rpc.tensors import decode_tensor, fill_tensor
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Completion, Prompt, Rollout, Sampling, SignalSpec
from tests.fault_server import messages, seal

VOCAB = 97
BACKEND = FakeBackend(VOCAB)
LEVELS = ("full", "topk", "candidates", "sampled")
FEW, MANY = 120, 30_000  # cases of each property
MEMORY = 16 * 2**20  # bytes beyond which a message of a few kilobytes must not make anything grow


@pytest.fixture(autouse=True)
def _trace_memory():
    tracemalloc.start(1)
    yield
    tracemalloc.stop()


# ---------------------------------------------------------------- messages that are right


def make_rollout(level: str) -> Rollout:
    random = np.random.default_rng(len(level))
    prompt, answer = Prompt("p", (3, 1, 4)), tuple(random.integers(0, VOCAB, 12).tolist())
    if level != "candidates":
        return Rollout("r", prompt, answer)
    return Rollout("r", prompt, answer, candidate_ids=np.stack([random.permutation(VOCAB)[:5] for _ in answer]).astype(np.int32))


def make_want(level: str) -> SignalSpec:
    return SignalSpec(level, 1.0 if level == "full" else 1.5, 6 if level == "topk" else 0)


ROLLOUTS = {level: make_rollout(level) for level in LEVELS}
WANTS = {level: make_want(level) for level in LEVELS}
CHUNKS = {
    level: messages(SignalCutter(7, ROLLOUTS[level], BACKEND.score([ROLLOUTS[level]], WANTS[level])[0], VOCAB))[0].chunk for level in LEVELS
}
SAMPLING = Sampling(max_new_tokens=20, stop_token_ids=(4, 5))
PROMPT = Prompt("p", (1, 2, 3))
COMPLETION = Completion(PROMPT, (5, 6, 7), "5 6 7", "stop")


# ---------------------------------------------------------------- what takes them in


def take_item(message: pb.ScoreItem) -> None:
    rollout, want, resume_from = codec.decode_item(message)
    check_want(want, BACKEND.info)
    check_rollout(rollout, want, BACKEND.info)
    assert 0 <= resume_from < len(rollout)
    assert all(0 <= token < VOCAB for token in rollout.all_ids)
    assert math.isfinite(want.temperature)
    assert want.temperature > 0


def take_prompt(message: pb.GeneratePrompt) -> None:
    check_prompt(codec.decode_prompt(message), SAMPLING, BACKEND.info)


def take_sampling(message: pb.Sampling) -> None:
    sampling = codec.decode_sampling(message)
    check_sampling(sampling, BACKEND.info)
    assert sampling.max_new_tokens >= 1
    assert 0 < sampling.top_p <= 1


def take_completion(message: pb.GeneratedText) -> None:
    completion = codec.decode_completion(message, PROMPT, SAMPLING, VOCAB)
    assert len(completion.token_ids) <= SAMPLING.max_new_tokens
    assert len(completion.text) <= 1024 * 21


def take_info(message: pb.TeacherInfo) -> None:
    info = codec.decode_info(message)
    assert info.vocab_size >= 1
    assert all(0 < offer.temperature_min <= offer.temperature_max < math.inf for offer in info.offers)


def take_failure(message: pb.ItemFailure) -> None:
    error = codec.decode_failure(message)
    assert 0 <= error.retry_after < math.inf
    assert len(str(error)) < 2000


def take_chunk(level: str, message: pb.SignalChunk) -> None:
    """What is taken is a distribution, by an independent look at it; what is not leaves the assembler as it was."""
    assert payload_bytes(message) >= 0
    assembler = SignalAssembler(ROLLOUTS[level], WANTS[level], VOCAB, "rollout r")
    assembler.add(message)
    assert 0 < assembler.position <= 12
    if not assembler.is_complete:
        return
    signal = assembler.signal()
    if level == "full":
        assert signal.logits.shape == (12, VOCAB)
        assert (signal.logits.max(axis=1) == 0).all()
        return
    assert signal.sampled.shape == (12,)
    assert (signal.sampled <= 1e-4).all()
    if level != "sampled":
        assert ((signal.ids >= 0) & (signal.ids < VOCAB)).all()
        assert all(len(set(row)) == len(row) for row in signal.ids.tolist())
        mass = np.exp(signal.logprobs.astype(np.float64)).sum(axis=1) + np.exp(signal.log_tail.astype(np.float64))
        np.testing.assert_allclose(mass, 1.0, atol=min(1e-5, MASS_TOLERANCE))


def take_request(message: pb.ScoreRequest) -> None:
    parts = parts_of(message)
    assert len(parts) <= BATCH_MESSAGES
    for part in parts:
        if part.WhichOneof("kind") == "item":
            take_item(part.item)


def take_response(message: pb.ScoreResponse) -> None:
    parts = parts_of(message)
    assert len(parts) <= BATCH_MESSAGES
    for part in parts:
        if part.WhichOneof("kind") == "failure":
            take_failure(part.failure)


def batch_of_requests() -> bytes:
    message = pb.ScoreRequest()
    for level in LEVELS:
        codec.fill_item(add_part(message, True).item, 7, ROLLOUTS[level], WANTS[level])
    add_part(message, True).credit.bytes = 9
    return message.SerializeToString()


def batch_of_responses() -> bytes:
    failure = codec.encode_failure(7, RefusedError("internal", "no"))
    parts = [[pb.ScoreResponse(failure=failure).SerializeToString()], [pb.ScoreResponse(chunk=CHUNKS["topk"]).SerializeToString()]]
    return joined(parts, is_batch=True)


TAKERS: dict[str, tuple[type, Callable, bytes]] = {
    "item": (pb.ScoreItem, take_item, codec.encode_item(7, ROLLOUTS["topk"], WANTS["topk"]).item.SerializeToString()),
    "item with candidates": (
        pb.ScoreItem,
        take_item,
        codec.encode_item(7, ROLLOUTS["candidates"], WANTS["candidates"]).item.SerializeToString(),
    ),
    "prompt": (pb.GeneratePrompt, take_prompt, codec.encode_prompt(1, PROMPT).SerializeToString()),
    "sampling": (pb.Sampling, take_sampling, codec.encode_sampling(SAMPLING).SerializeToString()),
    "completion": (pb.GeneratedText, take_completion, codec.encode_completion(1, COMPLETION).SerializeToString()),
    "info": (pb.TeacherInfo, take_info, codec.encode_info(BACKEND.info).info.SerializeToString()),
    "failure": (
        pb.ItemFailure,
        take_failure,
        codec.encode_failure(7, RefusedError("internal", "no", is_retryable=True, retry_after=2.0)).SerializeToString(),
    ),
    "batch of requests": (pb.ScoreRequest, take_request, batch_of_requests()),
    "batch of responses": (pb.ScoreResponse, take_response, batch_of_responses()),
    **{f"{level} chunk": (pb.SignalChunk, functools.partial(take_chunk, level), CHUNKS[level].SerializeToString()) for level in LEVELS},
}


def take(name: str, data: bytes) -> None:
    """Only what is documented may be raised: `ValueError` by a decoder, `RefusedError` by a limit, `BadAnswerError` by an assembler."""
    kind, taker, _ = TAKERS[name]
    try:
        message = kind.FromString(data)
    except DecodeError:
        return
    told: Exception | None = None
    try:
        taker(message)
    except (ValueError, RefusedError, BadAnswerError) as error:
        told = error
    if told is not None:
        assert isinstance(told, BadAnswerError) == name.endswith("chunk")
        assert str(told).startswith("rollout r: " if name.endswith("chunk") else "")


# ---------------------------------------------------------------- what is done to them

MUTATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("flip"), st.integers(0, 2**16), st.integers(1, 255)),
        st.tuples(st.just("insert"), st.integers(0, 2**16), st.binary(min_size=1, max_size=12)),
        st.tuples(st.just("delete"), st.integers(0, 2**16), st.integers(1, 40)),
        st.tuples(st.just("repeat"), st.integers(0, 2**16), st.integers(1, 200)),
        st.tuples(st.just("cut"), st.integers(0, 2**16), st.just(0)),
    ),
    min_size=1,
    max_size=6,
)


def mutate(data: bytes, mutations) -> bytes:
    changed = bytearray(data)
    for kind, where, what in mutations:
        at = where % (len(changed) + 1)
        if kind == "flip" and at < len(changed):
            changed[at] ^= what
        elif kind == "insert":
            changed[at:at] = what
        elif kind == "delete":
            del changed[at : at + what]
        elif kind == "repeat":
            changed[at:at] = changed[at : at + what]
        elif kind == "cut":
            del changed[at:]
    return bytes(changed)


NUMBERS = st.one_of(st.integers(0, 100), st.sampled_from([0, 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))


@st.composite
def tensors(draw):
    """Tensors whose dtype, shape and data mostly agree, and whose numbers are of every kind."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.int32, np.uint16]))
    shape = draw(
        st.one_of(st.tuples(st.integers(0, 13)), st.tuples(st.sampled_from([0, 1, 11, 12, 13]), st.sampled_from([0, 1, 5, 6, 7, VOCAB])))
    )
    message = pb.Tensor()
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["bits", "logprobs", "ids", "zeros"]))
    size = math.prod(shape)
    if kind == "bits":
        array = np.frombuffer(random.bytes(size * np.dtype(dtype).itemsize), dtype).reshape(shape)
    elif kind == "zeros":
        array = np.zeros(shape, dtype)
    else:
        values = -random.exponential(2.0, shape) if kind == "logprobs" else random.integers(0, VOCAB + 2, shape)
        array = values.astype(np.int64).astype(dtype) if np.issubdtype(dtype, np.integer) else values.astype(dtype)
    fill_tensor(message, array)
    if draw(st.integers(0, 4)) == 0:
        del message.shape[:]
        message.shape.extend(draw(st.lists(NUMBERS, max_size=5)))
    if draw(st.integers(0, 9)) == 0:
        message.dtype = draw(st.integers(0, 9))
    return message


@st.composite
def chunks(draw):
    """A right chunk of some level with some of its fields replaced, its checksum mostly made right again."""
    level = draw(st.sampled_from(LEVELS))
    chunk = pb.SignalChunk()
    chunk.CopyFrom(CHUNKS[level])
    for name in draw(st.lists(st.sampled_from(["logits", "ids", "logprobs", "log_tail", "sampled"]), max_size=3, unique=True)):
        chunk.ClearField(name)
        if draw(st.integers(0, 3)):
            getattr(chunk, name).CopyFrom(draw(tensors()))
    for name in draw(st.lists(st.sampled_from(["position", "rows", "total_rows"]), max_size=2, unique=True)):
        setattr(chunk, name, draw(NUMBERS))
    if draw(st.integers(0, 5)) == 0:
        chunk.temperature = draw(st.floats())
    if draw(st.integers(0, 5)):
        seal(chunk)
    return level, chunk


def random_bytes(case) -> None:
    take(*case)


def mutated_bytes(case) -> None:
    name, mutations = case
    take(name, mutate(TAKERS[name][2], mutations))


def made_chunks(case) -> None:
    level, chunk = case
    take(f"{level} chunk", chunk.SerializeToString())


def made_tensors(message) -> None:
    told = ""
    try:
        array = decode_tensor(message, "tensor")
    except ValueError as error:
        told = str(error)
    assert told.startswith("tensor ") if told else array.nbytes == len(message.data)


NAMES = st.sampled_from(list(TAKERS))
PROPERTIES = {
    "random bytes": (random_bytes, st.tuples(NAMES, st.binary(max_size=400))),
    "mutated bytes": (mutated_bytes, st.tuples(NAMES, MUTATIONS)),
    "made chunks": (made_chunks, chunks()),
    "made tensors": (made_tensors, tensors()),
}


@pytest.mark.parametrize("name", PROPERTIES)
def test_decoders_take_anything(name):
    run(name, settings(max_examples=FEW, derandomize=True))


@pytest.mark.thorough
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", PROPERTIES)
def test_decoders_take_anything_many_times(name):
    run(name, settings(max_examples=MANY, database=None))


def run(name: str, how: settings) -> None:
    """Run one property, with an eye on the memory that each case takes."""
    property_, strategy = PROPERTIES[name]
    cases = 0

    @settings(how, deadline=None, suppress_health_check=list(HealthCheck))
    @given(strategy)
    def check(case):
        nonlocal cases
        cases += 1
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        property_(case)
        grown = tracemalloc.get_traced_memory()[1] - before
        assert grown < MEMORY, f"{grown} bytes for one message"

    check()
    assert cases >= how.max_examples
