"""Messages and back: what arrives equals an independent fp64 computation, and what is damaged is named."""

from __future__ import annotations

import zlib

import numpy as np
import pytest

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import BadAnswerError
from bbopd.rpc import codec, tensors
from bbopd.rpc.answers import CHUNK_BYTES, SignalAssembler, SignalCutter, answer_bytes, payload_bytes
from bbopd.teachers.fake import FakeBackend
from bbopd.types import Completion, Offer, Prompt, Rollout, Sampling, SignalSpec, TeacherInfo, TeacherSignal
from tests.fault_server import messages

LEVELS = ("full", "topk", "candidates", "sampled")


def make_rollout(length: int, vocab_size: int, seed: int = 0, candidates: int = 0) -> Rollout:
    random = np.random.default_rng(seed)
    prompt = Prompt("p", tuple(random.integers(0, vocab_size, 5).tolist()))
    answer = tuple(random.integers(0, vocab_size, length).tolist())
    if not candidates:
        return Rollout(f"r{seed}", prompt, answer)
    ids = np.stack([random.permutation(vocab_size)[:candidates] for _ in range(length)]).astype(np.int32)
    ids[0, -1] = -1
    return Rollout(f"r{seed}", prompt, answer, candidate_ids=ids)


def make_case(level: str, length: int = 40, vocab_size: int = 300, temperature: float = 1.5):
    want = SignalSpec(level, temperature, 8 if level == "topk" else 0)
    rollout = make_rollout(length, vocab_size, seed=len(level), candidates=7 if level == "candidates" else 0)
    backend = FakeBackend(vocab_size, seed=3)
    return backend, rollout, want, backend.score([rollout], want)[0]


def cut(rollout, signal, vocab_size, resume_from=0):
    return [response.chunk for response in messages(SignalCutter(7, rollout, signal, vocab_size, resume_from))]


def reassemble(chunks, rollout, want, vocab_size):
    assembler = SignalAssembler(rollout, want, vocab_size, "request 7")
    for chunk in chunks:
        assembler.add(pb.SignalChunk.FromString(chunk.SerializeToString()))
    return assembler.signal()


def dense_logprobs(backend, rollout, temperature):
    z = backend.logits(rollout).astype(np.float64) / temperature
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("vocab_size", [300, 70_000])
@pytest.mark.parametrize("level", LEVELS)
def test_an_answer_arrives_as_the_dense_distribution(level, vocab_size):
    backend, rollout, want, signal = make_case(level, 30, vocab_size)
    got = reassemble(cut(rollout, signal, vocab_size), rollout, want, vocab_size)
    if level == "full":
        z = backend.logits(rollout).astype(np.float64)
        expected = z - z.max(axis=1, keepdims=True)
        assert got.logits.dtype == np.float16
        assert got.temperature == 1.0
        np.testing.assert_allclose(got.logits, expected, rtol=2**-11, atol=1e-6)
        return
    dense = dense_logprobs(backend, rollout, want.temperature)
    np.testing.assert_allclose(got.sampled, dense[np.arange(30), list(rollout.token_ids)], rtol=1e-5, atol=1e-5)
    assert got.temperature == want.temperature
    if level == "sampled":
        return
    if level == "topk":
        expected_ids = np.argsort(-dense, axis=1, kind="stable")[:, :8]
        np.testing.assert_array_equal(got.ids, expected_ids)
    else:
        np.testing.assert_array_equal(got.ids, rollout.candidate_ids)
    is_id = got.ids >= 0
    assert np.isneginf(got.logprobs[~is_id]).all()
    expected = np.where(is_id, np.take_along_axis(dense, np.maximum(got.ids, 0), axis=1), -np.inf)
    np.testing.assert_allclose(got.logprobs[is_id], expected[is_id], rtol=2**-11, atol=3e-3)
    np.testing.assert_allclose(np.exp(got.log_tail), 1 - np.exp(expected).sum(axis=1), atol=3e-3)
    np.testing.assert_allclose(np.exp(got.logprobs).sum(axis=1) + np.exp(got.log_tail), 1.0, atol=1e-6)
    assert got.ids.dtype == np.int32
    assert got.logprobs.dtype == got.log_tail.dtype == got.sampled.dtype == np.float32


def test_topk_takes_392_bytes_a_token_at_64_over_128k_and_full_256008():
    rollout = make_rollout(3, 128_004)
    assert answer_bytes(rollout, SignalSpec("topk", 1.0, 64), 128_256) == 3 * 392
    assert answer_bytes(rollout, SignalSpec("full"), 128_004) == 3 * 256_008


@pytest.mark.parametrize("level", LEVELS)
def test_declared_bytes_are_those_of_the_message(level):
    _, rollout, want, signal = make_case(level)
    rows = SignalCutter(1, rollout, signal, 300)
    declared, (message,) = rows.next_bytes, messages(rows)
    chunk = message.chunk
    assert declared == payload_bytes(chunk) == answer_bytes(rollout, want, 300)


def test_long_answers_come_in_chunks_of_whole_rows_and_resume_where_they_stopped():
    _, rollout, want, signal = make_case("full", 100, 50_000)
    chunks = cut(rollout, signal, 50_000)
    assert len(chunks) > 3
    assert all(2**20 <= payload_bytes(chunk) <= CHUNK_BYTES for chunk in chunks[:-1])
    assembler = SignalAssembler(rollout, want, 50_000, "request 7")
    for chunk in chunks[:2]:
        assembler.add(chunk)
    assert not assembler.is_complete
    for chunk in cut(rollout, signal, 50_000, assembler.position):
        assembler.add(chunk)
    np.testing.assert_array_equal(assembler.signal().logits, signal.logits)


def test_float32_logits_pass_unrounded():
    backend, rollout, want, _ = make_case("full")
    z = backend.logits(rollout)
    exact = z - z.max(axis=1, keepdims=True)
    got = reassemble(cut(rollout, TeacherSignal("full", logits=exact), 300), rollout, want, 300)
    assert got.logits.dtype == np.float32
    np.testing.assert_array_equal(got.logits, exact)


def greedy(backend, rollout):
    """The same prompt with the answer that the model finds likeliest, token by token."""
    ids = list(rollout.token_ids)
    for row in range(len(ids)):
        ids[row] = int(backend.logits(Rollout("r", rollout.prompt, tuple(ids)))[row].argmax())
    return Rollout("r", rollout.prompt, tuple(ids))


def with_array(signal: TeacherSignal, name: str, change) -> TeacherSignal:
    arrays = {field: getattr(signal, field) for field in ("logits", "ids", "logprobs", "log_tail", "sampled")}
    arrays[name] = change(arrays[name].copy())
    return TeacherSignal(signal.level, signal.temperature, **arrays)


def put(value, row=3, column=None):
    def change(array):
        array[row if column is None else (row, column)] = value
        return array

    return change


@pytest.mark.parametrize(
    ("level", "name", "change", "message"),
    [
        ("full", "logits", put(np.nan, 3, 5), "maximum of 0.*nan at response token 3"),
        ("full", "logits", put(-np.float16(np.nan), 3, 5), "maximum of 0.*nan at response token 3"),
        ("full", "logits", put(0.5, 3, 5), "maximum of 0.*0.5 at response token 3"),
        ("full", "logits", put(-1.0), "maximum of 0.*-1 at response token 3"),
        ("full", "logits", lambda a: np.ascontiguousarray(a[:, :-1]), r"logits float16 \[40, 299\], expected .* \[40, 300\]"),
        ("sampled", "sampled", put(np.nan), "sampled logprob nan at response token 3"),
        ("sampled", "sampled", put(0.25), "sampled logprob 0.25 at response token 3"),
        ("topk", "logprobs", put(np.nan, 3, 0), "logprob nan at response token 3"),
        ("topk", "logprobs", put(-np.inf, 3, 0), "falling order"),
        ("topk", "logprobs", lambda a: a - 0.05, "total probability is not 1: 0.9"),
        ("topk", "log_tail", put(np.nan), "log_tail nan at response token 3"),
        ("topk", "log_tail", put(-np.inf), "total probability is not 1"),
        ("topk", "ids", put(300, 3, 2), "id outside the vocabulary of 300: 300 at response token 3"),
        ("topk", "ids", lambda a: np.concatenate([a[:, :1], a[:, :1], a[:, 2:]], axis=1), "id given twice"),
        ("topk", "ids", lambda a: np.ascontiguousarray(a[:, :-1]), "expected"),
        ("topk", "sampled", lambda a: a - 0.01, "same token by itself"),
        ("candidates", "logprobs", put(0.5, 3, 0), "logprob 0.5"),
        ("candidates", "log_tail", lambda a: a - 0.05, "total probability"),
    ],
)
def test_a_bad_answer_is_named(level, name, change, message):
    _, rollout, want, signal = make_case(level)
    if level == "topk":  # whose own tokens are surely among the ids
        rollout = greedy(FakeBackend(300, seed=3), rollout)
        signal = FakeBackend(300, seed=3).score([rollout], want)[0]
    bad = with_array(signal, name, change)
    with pytest.raises(BadAnswerError, match=r"request 7.*" + message):
        reassemble(cut(rollout, bad, 300), rollout, want, 300)
    reassemble(cut(rollout, signal, 300), rollout, want, 300)


def test_an_answer_that_slipped_by_a_row_is_found():
    backend, rollout, want, _ = make_case("topk")
    rollout = greedy(backend, rollout)
    signal = backend.score([rollout], want)[0]
    slipped = with_array(
        with_array(with_array(signal, "ids", lambda a: np.roll(a, 1, 0)), "logprobs", lambda a: np.roll(a, 1, 0)),
        "log_tail",
        lambda a: np.roll(a, 1, 0),
    )
    with pytest.raises(BadAnswerError, match="rows do not belong to this rollout"):
        reassemble(cut(rollout, slipped, 300), rollout, want, 300)


def edit(**fields):
    def apply(chunk):
        for name, value in fields.items():
            setattr(chunk, name, value)

    return apply


def flip_a_byte(chunk):
    data = bytearray(chunk.logprobs.data)
    data[10] ^= 1
    chunk.logprobs.data = bytes(data)


def cut_a_byte(chunk):
    chunk.logprobs.data = chunk.logprobs.data[:-1]


def widen_the_shape(chunk):
    chunk.logprobs.shape[1] += 1


def unknown_dtype(chunk):
    chunk.logprobs.dtype = pb.DTYPE_UNSPECIFIED


def without_tail(chunk):
    chunk.ClearField("log_tail")
    crc = 0
    for name in ("ids", "logprobs", "sampled"):
        crc = zlib.crc32(getattr(chunk, name).data, crc)
    chunk.crc32 = crc


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (edit(position=1), "brings rows 1..41 of 40, expected from 0"),
        (edit(rows=0), "brings rows 0..0"),
        (edit(total_rows=41), "of 41, expected from 0 on, of 40"),
        (edit(level=pb.LEVEL_FULL), "has level 1, asked was 3"),
        (edit(temperature=2.0), "at temperature 2.0, asked was topk at 1.5"),
        (edit(input_sha256=bytes(32)), "is about other tokens"),
        (edit(crc32=1), "was damaged on its way"),
        (flip_a_byte, "was damaged on its way"),
        (cut_a_byte, "logprobs has 639 bytes, float16 .* needs 640"),
        (widen_the_shape, "logprobs has 640 bytes"),
        (unknown_dtype, "unknown dtype 0"),
        (without_tail, "has no log_tail"),
    ],
)
def test_a_damaged_chunk_is_named(damage, message):
    _, rollout, want, signal = make_case("topk")
    (chunk,) = cut(rollout, signal, 300)
    damage(chunk)
    with pytest.raises(BadAnswerError, match=r"request 7.*" + message):
        reassemble([chunk], rollout, want, 300)


def test_the_hash_covers_everything_that_is_scored():
    want = SignalSpec("candidates")
    base = make_rollout(6, 50, candidates=4)
    other_split = Rollout("r", Prompt("p", base.all_ids[:4]), base.all_ids[4:], candidate_ids=base.candidate_ids)
    other_candidates = Rollout("r", base.prompt, base.token_ids, candidate_ids=base.candidate_ids[:, ::-1])
    other_answer = Rollout("r", base.prompt, (*base.token_ids[:-1], (base.token_ids[-1] + 1) % 50), candidate_ids=base.candidate_ids)
    hashes = {codec.input_sha256(rollout, want) for rollout in (base, other_split, other_candidates, other_answer)}
    assert len(hashes) == 4
    assert codec.input_sha256(base, want) == codec.input_sha256(make_rollout(6, 50, candidates=4), want)


@pytest.mark.parametrize("level", LEVELS)
def test_items_come_back_as_they_were(level):
    _, rollout, want, _ = make_case(level)
    message = pb.ScoreRequest.FromString(codec.encode_item(9, rollout, want, 4).SerializeToString()).item
    got, got_want, resume_from = codec.decode_item(message)
    assert (got.rollout_id, got.all_ids, got.token_ids) == (rollout.rollout_id, rollout.all_ids, rollout.token_ids)
    assert (got_want, resume_from, message.request_id) == (want, 4, 9)
    if level == "candidates":
        np.testing.assert_array_equal(got.candidate_ids, rollout.candidate_ids)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (edit(prompt_tokens=99), "prompt_tokens 99 is more than"),
        (edit(resume_from=40), "resume_from 40 leaves nothing of 40"),
        (lambda item: setattr(item.want, "level", 77), "level 77"),
        (
            lambda item: item.candidate_ids.CopyFrom(tensors.encode_tensor(np.zeros((40, 2), np.int32))),
            "candidate_ids come with level 'topk'",
        ),
        (lambda item: item.token_ids.CopyFrom(tensors.encode_tensor(np.zeros(45, np.float32))), "token_ids is float32"),
    ],
)
def test_a_malformed_item_is_named(change, message):
    _, rollout, want, _ = make_case("topk")
    item = codec.encode_item(9, rollout, want).item
    change(item)
    with pytest.raises(ValueError, match=message):
        codec.decode_item(item)


def test_info_comes_back_as_it_was():
    info = TeacherInfo(
        "m",
        7,
        (Offer("topk", 64, 0.5, 2.0, "derived"), Offer("full")),
        "abc",
        3,
        "0" * 64,
        "1" * 64,
        "2" * 64,
        4096,
        8192,
        1.25,
        "EUR",
        2.5,
    )
    message = pb.GetInfoResponse.FromString(codec.encode_info(info).SerializeToString())
    assert codec.decode_info(message.info) == info


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"vocab_size": 0}, "vocab_size"),
        ({"vocab_sha256": "A" * 64}, "vocab_sha256"),
        ({"price_per_million_tokens": float("nan")}, "price"),
        ({"max_requests_per_second": float("inf")}, "max_requests_per_second is inf"),
        ({"model": "m" * 1025}, "model 'm+' is no name: at most 1024"),
        ({"model": "two\nlines"}, "model .* is no name"),
        ({"currency": "\x1b[31m"}, "currency .* is no name"),
    ],
)
def test_an_impossible_info_is_refused(fields, message):
    info = codec.encode_info(TeacherInfo("m", 7, ())).info
    edit(**fields)(info)
    with pytest.raises(ValueError, match=message):
        codec.decode_info(info)


def test_sampling_prompts_and_completions_come_back_as_they_were():
    sampling = Sampling(5, 0.7, 0.9, 4, 2**40, (1, 2))
    prompt = Prompt("p", (3, 4))
    assert codec.decode_sampling(codec.encode_sampling(sampling)) == sampling
    assert codec.decode_prompt(codec.encode_prompt(1, prompt)) == prompt
    done = Completion(prompt, (5, 1), "five", "stop")
    message = codec.encode_completion(1, done)
    assert codec.decode_completion(message, prompt, sampling, 10) == done
    with pytest.raises(ValueError, match="outside the vocabulary of 5"):
        codec.decode_completion(message, prompt, sampling, 5)
    with pytest.raises(ValueError, match="at most 1"):
        codec.decode_completion(message, prompt, Sampling(1), 10)
