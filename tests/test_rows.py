"""Rows checked and copied in C++ against NumPy's rule for them, on right rows and on rows spoilt in every way, on every instruction set.

``make test`` tries a few hundred spoilt rows, ``make fuzz`` tens of thousands.
"""

from __future__ import annotations

import dataclasses
import zlib

import numpy as np
import pytest
from bbopd._C import cpu_features, crc32, signal_rows
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bbopd.hardware import LEVELS
from bbopd.rpc.rows import id_dtype, kept_rows, kept_rows_by_numpy, sent_rows
from bbopd.rpc.signals import MASS_TOLERANCE, check_signal
from bbopd.types import SignalSpec, TeacherSignal

AVAILABLE = ["portable", *(name for name in ("avx2", "avx512") if cpu_features()[name])]
WIDTHS = (1, 2, 5, 8, 15, 16, 17, 64, 100)
VOCABULARIES = (100, 4096, 2**16, 2**16 + 1, 128_256)
FEW, MANY = 300, 20_000


def make_rows(random: np.random.Generator, level: str, N: int, K: int, V: int) -> tuple[TeacherSignal, SignalSpec, np.ndarray]:
    """A right answer as it travels, what it answers, and the tokens it is about: among the ids in every second row."""
    weights = -np.sort(-(random.standard_exponential((N, K + 1)) ** random.choice([1, 4, 12])), axis=1)
    logprobs = np.log(weights / weights.sum(axis=1, keepdims=True))
    ids = np.stack([random.choice(V, K, replace=False) for _ in range(N)]).astype(np.int32)
    at, rows = random.integers(0, K, N), np.arange(N)
    targets, own = ids[rows, at].copy(), logprobs[rows, at]
    outside = (random.random(N) < 0.5) & (K < V)
    for row in np.flatnonzero(outside):
        targets[row] = random.choice(np.setdiff1d(np.arange(min(V, 500)), ids[row]))
        own[row] = logprobs[row, K] - 1
    if level == "candidates":
        order = random.permuted(np.tile(np.arange(K), (N, 1)), axis=1)
        ids, logprobs[:, :K] = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs[:, :K], order, 1)
    wire_ids = ids.astype(id_dtype(V)) if level == "topk" else ids
    half, tail, sampled = logprobs[:, :K].astype(np.float16), logprobs[:, K].astype(np.float32), own.astype(np.float32)
    want = SignalSpec(level, 1.5, K if level == "topk" else 0)
    return TeacherSignal(level, 1.5, ids=wire_ids, logprobs=half, log_tail=tail, sampled=sampled), want, targets


def spoil(random: np.random.Generator, how: str, signal: TeacherSignal, V: int) -> TeacherSignal:
    """The same with one value of it, or one row, changed."""
    ids, logprobs = signal.ids.copy(), signal.logprobs.copy()
    log_tail, sampled = signal.log_tail.copy(), signal.sampled.copy()
    N, K = ids.shape
    row, at, other = random.integers(0, N), random.integers(0, K), random.integers(0, K)
    value = random.choice(np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 9e-5, 1.2e-4, 1.0, -1e-8, -7e4, -87.4, -104.0], np.float32))
    with np.errstate(over="ignore"):
        if how == "logprob":
            logprobs[row, at] = value
        elif how == "tail":
            log_tail[row] = value
        elif how == "own":
            sampled[row] = value
        elif how == "own a little":
            sampled[row] += random.choice([-1, 1]) * MASS_TOLERANCE * random.choice([0.5, 0.98, 1.02, 2, 5])
        elif how == "swap":
            logprobs[row, [at, other]] = logprobs[row, [other, at]]
        elif how == "same id":
            ids[row, at] = ids[row, other]
        elif how == "id":
            ids[row, at] = random.choice(np.array([0, V - 1, V, -1, 2**31 - 1, -(2**31), 2**16 - 1])).astype(ids.dtype)
        elif how == "mass":
            rest = 1.0 - np.exp(logprobs[row].astype(np.float64)).sum()
            off = MASS_TOLERANCE * random.choice([-1, 1]) * random.choice([0.9, 0.99, 0.9999, 1.0001, 1.01, 1.1])
            log_tail[row] = np.log(max(rest + off, 1e-30))
        elif how == "bits":
            array = [ids, logprobs, log_tail, sampled][random.integers(0, 4)]
            array.view(np.uint8).reshape(-1)[random.integers(0, array.nbytes)] ^= np.uint8(1 << random.integers(0, 8))
    return dataclasses.replace(signal, ids=ids, logprobs=logprobs, log_tail=log_tail, sampled=sampled)


SPOILT = ("nothing", "logprob", "tail", "own", "own a little", "swap", "same id", "id", "mass", "bits")
CASES = st.tuples(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["topk", "candidates"]),
    st.integers(1, 6),
    st.sampled_from(WIDTHS),
    st.sampled_from(VOCABULARIES),
    st.booleans(),
    st.lists(st.sampled_from(SPOILT), min_size=1, max_size=2),
)


def judge(call, *arguments) -> TeacherSignal | str:
    with np.errstate(over="ignore", invalid="ignore"):
        try:
            return call(*arguments)
        except ValueError as error:
            return str(error)


def taken_by_cpp(signal, want, targets, V: int, level: int) -> bool:
    outputs = np.empty(signal.ids.shape, np.int32), np.empty(signal.ids.shape, np.float32), np.empty(len(targets), np.float32)
    return signal_rows(signal.ids, signal.logprobs, signal.log_tail, signal.sampled, targets, V, want.level == "topk", level, *outputs)


def compare(monkeypatch, case) -> None:
    seed, level, N, K, V, is_half, spoilt = case
    random = np.random.default_rng(seed)
    signal, want, targets = make_rows(random, level, N, K, V)
    if not is_half:
        signal = dataclasses.replace(signal, logprobs=signal.logprobs.astype(np.float32))
    for how in spoilt:
        signal = spoil(random, how, signal, V)
    truth = judge(kept_rows_by_numpy, signal, want, targets, V, 3)
    model = dataclasses.replace(signal, ids=signal.ids.astype(np.int32))
    sent_truth = judge(check_signal, model, want, targets, V)
    for name in AVAILABLE:
        monkeypatch.setenv("BBOPD_CPU_LEVEL", name)
        is_good = taken_by_cpp(signal, want, targets, V, LEVELS.index(name))
        assert not (is_good and isinstance(truth, str)), truth
        assert is_good or set(spoilt) != {"nothing"}, "right rows need no second look"
        kept, sent = judge(kept_rows, signal, want, targets, V, 3), judge(sent_rows, model, want, targets, V)
        if isinstance(truth, str):
            assert kept == truth
            assert sent == sent_truth
            continue
        assert kept.ids.dtype == np.int32
        assert kept.logprobs.dtype == kept.log_tail.dtype == np.float32
        np.testing.assert_array_equal(kept.ids, truth.ids)
        np.testing.assert_allclose(kept.logprobs, truth.logprobs, rtol=2e-7, atol=1e-6)
        np.testing.assert_allclose(kept.log_tail, truth.log_tail, rtol=2e-7, atol=1e-6)
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(
                sent.logprobs.astype(np.float16).view(np.uint16), model.logprobs.astype(np.float16).view(np.uint16)
            )
        np.testing.assert_array_equal(sent.ids, model.ids)


def run(how: settings) -> None:
    @settings(how, deadline=None, suppress_health_check=list(HealthCheck))
    @given(CASES)
    def check(case):
        with pytest.MonkeyPatch.context() as monkeypatch:
            compare(monkeypatch, case)

    check()


def test_cpp_and_numpy_take_and_refuse_the_same_rows():
    run(settings(max_examples=FEW, derandomize=True))


def test_the_response_token_is_held_to_its_logprob_wherever_it_stands(monkeypatch):
    """Also where an id is there twice: candidates are held to the ids that were asked about, and not to being different."""
    compare(monkeypatch, (4, "candidates", 4, 8, 100, False, ["nothing", "same id"]))


@pytest.mark.thorough
@pytest.mark.timeout(3600)
def test_cpp_and_numpy_take_and_refuse_the_same_rows_many_times():
    run(settings(max_examples=MANY, database=None))


@pytest.mark.parametrize("level", ["topk", "candidates"])
@pytest.mark.parametrize("name", AVAILABLE)
def test_the_mass_of_kept_rows_is_one_in_float64(monkeypatch, name, level):
    monkeypatch.setenv("BBOPD_CPU_LEVEL", name)
    random = np.random.default_rng(0)
    for K in WIDTHS[:-1]:
        signal, want, targets = make_rows(random, level, 50, K, 128_256)
        kept = kept_rows(signal, want, targets, 128_256)
        mass = np.exp(kept.logprobs.astype(np.float64)).sum(axis=1) + np.exp(kept.log_tail.astype(np.float64))
        np.testing.assert_allclose(mass, 1.0, atol=1e-6)
        moved = kept.logprobs.astype(np.float64) - signal.logprobs.astype(np.float64)
        np.testing.assert_allclose(moved, np.broadcast_to(moved[:, :1], moved.shape), atol=1e-5)  # one factor for the whole row


@pytest.mark.parametrize(
    "change",
    [
        lambda signal: {"logprobs": signal.logprobs.astype(np.float64)},
        lambda signal: {"logprobs": signal.logprobs.T.copy()},
        lambda signal: {"log_tail": signal.log_tail[:-1]},
        lambda signal: {"sampled": signal.sampled.astype(np.float16)},
        lambda signal: {"ids": signal.ids[:, :-1]},
        lambda signal: {"ids": None},
        lambda signal: {"temperature": 1.0},
        lambda signal: {"logprobs": signal.logprobs.astype(">f4")},
        lambda signal: {"logprobs": np.asfortranarray(signal.logprobs)},
        lambda signal: {"log_tail": np.repeat(signal.log_tail, 2)[::2]},
    ],
)
def test_arrays_of_another_form_are_numpys_to_judge(change):
    signal, want, targets = make_rows(np.random.default_rng(0), "topk", 6, 16, 128_256)
    changed = dataclasses.replace(signal, **change(signal))
    truth, kept = (judge(call, changed, want, targets, 128_256, 0) for call in (kept_rows_by_numpy, kept_rows))
    if isinstance(truth, str):
        assert kept == truth
    else:
        np.testing.assert_allclose(kept.logprobs, truth.logprobs, rtol=2e-7, atol=1e-6)


def test_what_is_written_to_must_be_as_large_as_what_is_read():
    signal, _, targets = make_rows(np.random.default_rng(0), "topk", 6, 16, 128_256)
    inputs = (signal.ids, signal.logprobs, signal.log_tail, signal.sampled, targets, 128_256, True, 0)
    with pytest.raises(ValueError, match="another size"):
        signal_rows(*inputs, None, np.empty((5, 16), np.float32), None)


def test_a_vocabulary_too_large_to_mark_is_numpys():
    signal, want, targets = make_rows(np.random.default_rng(0), "topk", 2, 16, 100_000)
    assert not taken_by_cpp(signal, want, targets, 2**31, 0)
    assert kept_rows(signal, want, targets, 2**31).logprobs.dtype == np.float32


def test_crc32_is_that_of_zlib():
    random = np.random.default_rng(0)
    for size in [*range(200), 1000, 4097, 100_003]:
        data, start = random.bytes(size + 3)[3:], int(random.integers(0, 2**32))
        assert crc32(data, start) == zlib.crc32(data, start)
        assert crc32(np.frombuffer(data, np.uint8)[size // 3 :], start) == zlib.crc32(data[size // 3 :], start)
