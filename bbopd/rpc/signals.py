"""Whether an array of numbers is what a teacher may say of a rollout. Used on what a model gives and on what arrives.

Shape suffixes: ``L`` response tokens (here: rows), ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from bbopd.types import Rollout, SignalSpec, TeacherSignal

__all__ = ["MASS_TOLERANCE", "check_signal", "has_nan_or_inf", "own_slots", "signal_from_logits", "signal_temperature", "with_sampled"]

MASS_TOLERANCE = 2e-3
"""Largest |sum p + tail - 1|: float16 logprobs leave that much, a wrong temperature or a lost tail far more."""

_ABOVE_ZERO = 1e-4  # a logprob of 0, as float32 sums round it
_INTEGERS = {2: (np.int16, np.uint16, 0x7C00), 4: (np.int32, np.uint32, 0x7F800000), 8: (np.int64, np.uint64, 0x7FF0 << 48)}


def signal_temperature(want: SignalSpec) -> float:
    """The temperature an answer to ``want`` is at: raw logits are at 1, whatever was asked."""
    return 1.0 if want.level == "full" else want.temperature


def check_signal(signal: TeacherSignal, want: SignalSpec, target_ids: np.ndarray, vocab_size: int, first_row: int = 0) -> np.ndarray | None:
    """Check rows ``first_row …`` of an answer against what was asked.

    Parameters
    ----------
    signal : rows of the answer, float16 or float32.
    target_ids : [L] int, the response tokens of these rows.
    vocab_size : V.
    first_row : number of the first row, for messages.

    Returns
    -------
    np.ndarray or None : [L] float32, the total probability of each row, within `MASS_TOLERANCE` of 1; None at levels without ids.

    Raises
    ------
    ValueError : naming the row and the value.
    """
    rows = len(target_ids)
    if signal.level != want.level or signal.temperature != signal_temperature(want):
        raise ValueError(f"is {signal.level} at temperature {signal.temperature}, asked was {want.level} at {signal_temperature(want)}")
    if want.level == "full":
        _check_logits(_expect(signal.logits, "logits", (rows, vocab_size), (np.float16, np.float32)), first_row)
        return None
    sampled = _expect(signal.sampled, "sampled", (rows,), (np.float32,))
    _reject_nan_or_positive(sampled, "sampled logprob", first_row)
    if want.level == "sampled":
        return None
    width = min(want.top_k, vocab_size) if want.level == "topk" else -1
    ids = _expect(signal.ids, "ids", (rows, width), (np.int32,))
    logprobs = _expect(signal.logprobs, "logprobs", ids.shape, (np.float16, np.float32)).astype(np.float32, copy=False)
    log_tail = _expect(signal.log_tail, "log_tail", (rows,), (np.float32,))
    _reject_nan_or_positive(logprobs, "logprob", first_row)
    _reject_nan_or_positive(log_tail, "log_tail", first_row)
    if want.level == "topk":
        _check_ids(ids, vocab_size, first_row)
        if _neighbours(np.less, logprobs).any():
            _reject(logprobs[:, 1:] > logprobs[:, :-1], logprobs[:, 1:], "logprob out of falling order:", first_row)
    mass: np.ndarray = np.einsum("ij->i", np.exp(logprobs)) + np.exp(log_tail)
    _reject(np.abs(mass - 1.0) > MASS_TOLERANCE, mass, "total probability is not 1:", first_row)
    _check_own_token(ids, logprobs, sampled, target_ids, first_row)
    return mass


def signal_from_logits(logits: np.ndarray, rollout: Rollout, want: SignalSpec) -> TeacherSignal:
    """What ``want`` asks of a rollout, in float64, for a backend that has all its logits at hand.

    Parameters
    ----------
    logits : [L, V], any float dtype; row i is raw and predicts response token i.
    rollout : with ``candidate_ids`` at level ``candidates``.
    """
    if want.level == "full":
        shifted = logits - logits.max(axis=1, keepdims=True)
        return TeacherSignal("full", logits=shifted.astype(np.float16))
    scaled = logits.astype(np.float64) / want.temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    logprobs = scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    sampled = np.take_along_axis(logprobs, np.array(rollout.token_ids)[:, None], axis=1)[:, 0].astype(np.float32)
    if want.level == "sampled":
        return TeacherSignal("sampled", want.temperature, sampled=sampled)
    if want.level == "topk":
        ids = np.argsort(-logprobs, axis=1, kind="stable")[:, : want.top_k]
    else:
        assert rollout.candidate_ids is not None, "check_rollout comes first"
        ids = rollout.candidate_ids
    chosen = np.where(ids >= 0, np.take_along_axis(logprobs, np.maximum(ids, 0), axis=1), -np.inf)
    row, column = np.nonzero(ids >= 0)
    logprobs[row, ids[row, column]] = -np.inf  # what is left is the tail: a sum, never 1 minus the rest
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(logprobs).sum(axis=1))
    return TeacherSignal(
        want.level,
        want.temperature,
        ids=ids.astype(np.int32),
        logprobs=chosen.astype(np.float32),
        log_tail=log_tail.astype(np.float32),
        sampled=sampled,
    )


def has_nan_or_inf(values: np.ndarray) -> bool:
    """Whether any entry of a floating-point array is NaN or +inf; −inf, the logarithm of 0, is neither."""
    if values.itemsize > 2:
        return not values.max(initial=-np.inf) < np.inf  # NaN is the maximum of what holds one, and compares False
    signed, unsigned, inf, minus_inf = _as_integers(values)
    return bool(values.size) and bool(signed.max() >= inf or unsigned.max() > minus_inf)


def _as_integers(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, int, int]:
    """The bits of ``values`` as signed and as unsigned integers, and what +inf is among the first and −inf among the second.

    NumPy compares float16 sixty times slower than integers. Read as signed ones, what is above zero is positive in the same order,
    with NaN of that sign above +inf; read as unsigned ones, NaN of the other sign lies above −inf.
    """
    signed, unsigned, inf = _INTEGERS[values.dtype.itemsize]
    bits = np.ascontiguousarray(values)
    return bits.view(signed), bits.view(unsigned), inf, inf + 2 ** (8 * values.itemsize - 1)


def _check_logits(logits: np.ndarray, first_row: int) -> None:
    """NaN-free and with a maximum of exactly 0 in every row."""
    signed, unsigned, _, minus_inf = _as_integers(logits)
    row_max = signed.max(axis=1)
    if row_max.any() or unsigned.max() > minus_inf:
        shown = logits.astype(np.float32).max(axis=1)  # NaN wins
        _reject(np.isnan(shown) | (row_max != 0), shown, "logits must have a maximum of 0, this row's is", first_row)


def _check_ids(ids: np.ndarray, vocab_size: int, first_row: int) -> None:
    """Inside the vocabulary, and none twice in a row."""
    ordered = np.sort(ids, axis=1)
    if ids.size and (ordered[:, 0].min() < 0 or ordered[:, -1].max() >= vocab_size):
        _reject((ids < 0) | (ids >= vocab_size), ids, f"id outside the vocabulary of {vocab_size}:", first_row)
    if _neighbours(np.equal, ordered).any():
        _reject(ordered[:, 1:] == ordered[:, :-1], ordered[:, 1:], "id given twice:", first_row)


def _neighbours(compare: np.ufunc, values: np.ndarray) -> np.ndarray:
    """``compare(left, right)`` of every two neighbours in a row. Over all of the memory at once: rows of 64 alone are slow."""
    flat = np.ravel(values)
    found: np.ndarray = compare(flat[:-1], flat[1:])
    found[values.shape[1] - 1 :: values.shape[1]] = False  # the last of a row and the first of the next
    return found


def _check_own_token(ids: np.ndarray, logprobs: np.ndarray, sampled: np.ndarray, target_ids: np.ndarray, first_row: int) -> None:
    """The response token's own logprob is told twice where it is among the ids: the two disagree in an answer that slipped by a row."""
    at = np.flatnonzero(ids == np.asarray(target_ids)[:, None])
    row = at // ids.shape[1]
    told, own = np.ravel(logprobs)[at], sampled[row]
    with np.errstate(invalid="ignore"):  # -inf against -inf agrees
        apart = (told != own) & ~(np.abs(told - own) <= MASS_TOLERANCE + 2.0**-10 * np.minimum(np.abs(told), np.abs(own)))
    if apart.any():
        first = int(apart.argmax())
        raise ValueError(
            f"says {told[first]:.5g} for response token {first_row + int(row[first])} among its ids and {own[first]:.5g} for the same "
            "token by itself: the rows do not belong to this rollout"
        )


def _reject_nan_or_positive(values: np.ndarray, what: str, first_row: int) -> None:
    if not values.max(initial=-np.inf) <= _ABOVE_ZERO:  # NaN is the maximum of what holds one, and compares False
        _reject(np.isnan(values) | (values > _ABOVE_ZERO), values, what, first_row)


def _expect(array: np.ndarray | None, name: str, shape: tuple[int, ...], dtypes: tuple[type, ...]) -> np.ndarray:
    if array is None:
        raise ValueError(f"has no {name}")
    fits = array.ndim == len(shape) and all(want in (have, -1) for have, want in zip(array.shape, shape, strict=True))
    if not fits or array.dtype not in dtypes:
        expected = " or ".join(np.dtype(dtype).name for dtype in dtypes)
        raise ValueError(f"has {name} {array.dtype} {list(array.shape)}, expected {expected} {list(shape)}")
    return array


def _reject(bad: np.ndarray, values: np.ndarray, what: str, first_row: int) -> None:
    if bad.any():
        where = np.unravel_index(int(bad.argmax()), bad.shape)
        raise ValueError(f"{what} {values[where].item():.6g} at response token {first_row + int(where[0])}")


def with_sampled(signal: TeacherSignal, token_ids: Sequence[int]) -> TeacherSignal:
    """A topk signal with the rollout's own token in its support: where it is none of the K ids, it leaves the tail for a slot of its own.

    No mass is made: a token that is said to have more than all of the tail, which only rounding can explain, has all of it.
    """
    if signal.level != "topk" or signal.sampled is None:
        return signal
    assert signal.ids is not None
    assert signal.logprobs is not None
    assert signal.log_tail is not None
    own_L = np.asarray(token_ids, dtype=np.int32)
    missing, own_logprobs, left = own_slots(signal.ids, signal.log_tail, signal.sampled, own_L)
    if not missing.size:
        return signal
    slot_L, slot_logprob_L, log_tail_L = np.full_like(own_L, -1), np.full(len(own_L), -np.inf, np.float32), signal.log_tail.copy()
    slot_L[missing], slot_logprob_L[missing], log_tail_L[missing] = own_L[missing], own_logprobs, left
    return replace(
        signal,
        ids=np.concatenate([signal.ids, slot_L[:, None]], axis=1),
        logprobs=np.concatenate([signal.logprobs, slot_logprob_L[:, None]], axis=1),
        log_tail=log_tail_L,
    )


def own_slots(ids: np.ndarray, log_tail: np.ndarray, sampled: np.ndarray, own_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows whose own token is none of their ids, its logprob there, and what it leaves of the tail (float64).

    Parameters
    ----------
    ids : [L, K] int; log_tail, sampled : [L] float, NaN in ``sampled`` where it is not known; own_ids : [L] int.
    """
    is_missing = ~np.isnan(sampled)
    is_missing[np.flatnonzero(ids == own_ids[:, None]) // ids.shape[1]] = False
    missing = np.flatnonzero(is_missing)
    tail = log_tail[missing].astype(np.float64)
    own = np.minimum(sampled[missing], tail)
    with np.errstate(divide="ignore", invalid="ignore"):
        left = np.where(tail == -np.inf, -np.inf, tail + np.log1p(-np.exp(own - tail)))
    return missing, own, left
