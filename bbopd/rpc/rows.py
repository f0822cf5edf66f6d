"""Rows of a teacher's answer, checked and made into the numbers that travel, or into those that are kept, in one pass of C++.

`check_signal` is the rule. What C++ does not take (`csrc/cpu/signal_rows.h`: rows that are wrong, only just right, or of unusual
types) goes through it in NumPy, which has the last word and words every error.

Shape suffixes: ``L`` response tokens (here: rows), ``K`` top-k or candidates.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from bbopd._C import signal_rows
from bbopd.hardware import LEVELS, allowed_level
from bbopd.rpc.signals import check_signal, signal_temperature
from bbopd.types import SignalSpec, TeacherSignal

__all__ = ["id_dtype", "kept_rows", "kept_rows_by_numpy", "sent_rows"]


def id_dtype(vocab_size: int) -> type[np.uint16] | type[np.int32]:
    """How ids travel."""
    return np.uint16 if vocab_size <= 2**16 else np.int32


def sent_rows(signal: TeacherSignal, want: SignalSpec, target_ids: np.ndarray, vocab_size: int) -> TeacherSignal:
    """What a model answered, once it is known to be right; with ids and logprobs as they travel where C++ has made them so.

    Parameters and errors are those of `check_signal`.
    """
    if _is_usual(signal, want, target_ids, vocab_size):
        assert signal.ids is not None
        ids = np.empty(signal.ids.shape, id_dtype(vocab_size)) if want.level == "topk" else None
        logprobs = np.empty(signal.ids.shape, np.float16)
        if _are_good(signal, want, target_ids, vocab_size, ids, logprobs, None):
            return dataclasses.replace(signal, ids=signal.ids if ids is None else ids, logprobs=logprobs)
    check_signal(signal, want, target_ids, vocab_size)
    return signal


def kept_rows(signal: TeacherSignal, want: SignalSpec, target_ids: np.ndarray, vocab_size: int, first_row: int = 0) -> TeacherSignal:
    """Rows that arrived, once they are known to be right, as they are kept: ids int32, logprobs float32, and a mass of 1 in each.

    Parameters and errors are those of `check_signal`; ``signal`` may have ids as they travel.
    """
    if _is_usual(signal, want, target_ids, vocab_size):
        assert signal.ids is not None
        ids = None if signal.ids.dtype == np.int32 else np.empty(signal.ids.shape, np.int32)
        logprobs, log_tail = np.empty(signal.ids.shape, np.float32), np.empty(len(target_ids), np.float32)
        if _are_good(signal, want, target_ids, vocab_size, ids, logprobs, log_tail):
            return dataclasses.replace(signal, ids=signal.ids if ids is None else ids, logprobs=logprobs, log_tail=log_tail)
    return kept_rows_by_numpy(signal, want, target_ids, vocab_size, first_row)


def kept_rows_by_numpy(
    signal: TeacherSignal, want: SignalSpec, target_ids: np.ndarray, vocab_size: int, first_row: int = 0
) -> TeacherSignal:
    """`kept_rows` without C++."""
    if signal.ids is not None and signal.ids.dtype == np.uint16:
        signal = dataclasses.replace(signal, ids=signal.ids.astype(np.int32))
    if signal.logprobs is not None and signal.logprobs.dtype == np.float16:
        signal = dataclasses.replace(signal, logprobs=signal.logprobs.astype(np.float32))
    mass = check_signal(signal, want, target_ids, vocab_size, first_row)
    if mass is None:
        return signal
    assert signal.logprobs is not None
    assert signal.log_tail is not None
    log_mass = np.log(mass)
    return dataclasses.replace(signal, logprobs=signal.logprobs - log_mass[:, None], log_tail=signal.log_tail - log_mass)


def _is_usual(signal: TeacherSignal, want: SignalSpec, target_ids: np.ndarray, vocab_size: int) -> bool:
    """Whether all that belongs to top-k or candidates is there, in shapes that agree; C++ looks at types and values."""
    arrays = (signal.ids, signal.logprobs, signal.log_tail, signal.sampled)
    if want.level not in ("topk", "candidates") or not all(isinstance(array, np.ndarray) for array in arrays):
        return False
    assert signal.ids is not None
    width = min(want.top_k, vocab_size) if want.level == "topk" else signal.ids.shape[-1]
    shapes = [array.shape for array in arrays if array is not None]
    rows = len(target_ids)
    is_asked = signal.level == want.level and signal.temperature == signal_temperature(want)
    return is_asked and shapes == [(rows, width), (rows, width), (rows,), (rows,)]


def _are_good(
    signal: TeacherSignal,
    want: SignalSpec,
    target_ids: np.ndarray,
    vocab_size: int,
    ids: np.ndarray | None,
    logprobs: np.ndarray,
    log_tail: np.ndarray | None,
) -> bool:
    """Whether C++ takes the rows; then it has filled in ``ids`` and ``logprobs`` [L, K], and ``log_tail`` [L]."""
    good: bool = signal_rows(
        signal.ids,
        signal.logprobs,
        signal.log_tail,
        signal.sampled,
        target_ids,
        vocab_size,
        want.level == "topk",
        LEVELS.index(allowed_level(LEVELS[-1])),
        ids,
        logprobs,
        log_tail,
    )
    return good
