"""From scored sequences to packed batches, and from an update cycle to its optimizer steps.

Shapes: ``P`` packed tokens, ``S`` sequences, ``N`` response tokens, ``L`` those of one sequence, ``V`` vocabulary, ``K`` ids a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, chain

import numpy as np
import torch

from bbopd.errors import BadAnswerError, DataError
from bbopd.rpc.signals import has_nan_or_inf, own_slots
from bbopd.types import (
    ALIGNED_ID,
    ALIGNED_RANK,
    ALIGNED_SPAN,
    IGNORE_INDEX,
    CandidateTeacher,
    DistillBatch,
    FullTeacher,
    Level,
    OpTeacher,
    Rollout,
    SampledTeacher,
    ScoredRollout,
    SignalSpec,
    SpanTeacher,
    TeacherSignal,
    TopKTeacher,
)

Item = ScoredRollout | Rollout


def rollout_of(item: Item) -> Rollout:
    return item.rollout if isinstance(item, ScoredRollout) else item


# ---------------------------------------------------------------- one packed batch


def assemble(items: Sequence[Item], want: SignalSpec | None) -> DistillBatch:
    """Lay ``items`` end to end, in their order, on the CPU.

    Row ``i`` of a response belongs to the packed token before it, which predicts it: ``target_rows`` = start + prompt length - 1 + i.
    Labels are the response tokens of labelled sequences, and -100 on the student's own. Teacher tensors are filled once, with no second
    copy; tokens of a plain `Rollout` among scored ones are marked not ``valid``.

    Parameters
    ----------
    items
        At least one; each with a prompt and a response.
    want
        What the teacher was asked; None makes ``teacher`` None, as does a batch without any signal, which written answers have not.

    Raises
    ------
    BadAnswerError
        For a signal of another level, temperature or number of rows than asked, or one with NaN or +inf, or advantages of a rollout
        without sampling logprobs; the rollout is named.
    """
    if not items:
        raise ValueError("a batch needs at least one sequence")
    rollouts = [rollout_of(item) for item in items]
    for rollout in rollouts:
        if not rollout.token_ids or not rollout.prompt.token_ids:
            raise ValueError(f"rollout {rollout.rollout_id} has an empty {'prompt' if rollout.token_ids else 'response'}")
    lengths = [len(rollout.all_ids) for rollout in rollouts]
    boundaries = [0, *accumulate(lengths)]
    target_rows = [
        np.arange(start + len(rollout.prompt.token_ids) - 1, start + len(rollout.all_ids) - 1)
        for start, rollout in zip(boundaries, rollouts, strict=False)
    ]
    # in NumPy: what torch does of this wakes all its threads, which wait for more while the teacher needs the cores
    rows_N = np.concatenate(target_rows)
    input_ids = np.fromiter(chain.from_iterable(rollout.all_ids for rollout in rollouts), np.int64, boundaries[-1])
    target_ids = input_ids[rows_N + 1]
    labelled = np.repeat([rollout.is_labelled for rollout in rollouts], [len(rollout) for rollout in rollouts])
    return DistillBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(np.concatenate([np.arange(length) for length in lengths])),
        boundaries=torch.tensor(boundaries, dtype=torch.int32),
        target_rows=torch.from_numpy(rows_N),
        target_ids=torch.from_numpy(target_ids),
        labels=torch.from_numpy(np.where(labelled, target_ids, IGNORE_INDEX)),
        token_weight=torch.from_numpy(_weights(items)),
        teacher=_teacher(items, want),
        response_tokens=len(target_ids),
        rollout_tokens=sum(len(rollout) for rollout in rollouts if not rollout.is_labelled),
        spans=_spans(items, want),
        reference_logprobs=_reference_logprobs(items),
        behavior_logprobs=_of_tokens(rollouts, [rollout.logprobs for rollout in rollouts]),
        sampled_logprobs=_of_tokens(rollouts, [item.signal.sampled if isinstance(item, ScoredRollout) else None for item in items]),
    )


def _weights(items: Sequence[Item]) -> np.ndarray:
    """How often each response token counts, [N] float32."""
    weights = [item.weight if isinstance(item, ScoredRollout) else 1.0 for item in items]
    return np.repeat(np.asarray(weights, np.float32), [len(rollout_of(item)) for item in items])


def _reference_logprobs(items: Sequence[Item]) -> torch.Tensor | None:
    if not any(isinstance(item, ScoredRollout) and item.signal.reference_logprobs is not None for item in items):
        return None
    near = [item if isinstance(item, ScoredRollout) and item.signal.reference_logprobs is not None else rollout_of(item) for item in items]
    return _fill(near, lambda signal: signal.reference_logprobs, (), np.float32, 0)[0]


def _of_tokens(rollouts: Sequence[Rollout], values: Sequence[np.ndarray | None]) -> torch.Tensor | None:
    """One number for every response token, [N]; NaN for those of a rollout without, None where no rollout has any."""
    if all(given is None for given in values):
        return None
    parts = [np.full(len(rollout), np.nan) if given is None else given for rollout, given in zip(rollouts, values, strict=True)]
    return torch.from_numpy(np.concatenate(parts).astype(np.float32))


def _teacher(items: Sequence[Item], want: SignalSpec | None) -> OpTeacher | None:
    scored = [item for item in items if isinstance(item, ScoredRollout)]
    if want is not None and want.level == "text":  # only what was judged has a signal
        items = [rollout_of(item) if isinstance(item, ScoredRollout) and item.signal.advantages is None else item for item in items]
        scored = [item for item in items if isinstance(item, ScoredRollout)]
    if want is None or not scored:
        return None
    for item in scored:
        _check_signal(item, want)
    return _TEACHERS[want.level](items, scored, want)


def _full(items: Sequence[Item], scored: Sequence[ScoredRollout], want: SignalSpec) -> OpTeacher:
    first = scored[0].signal.logits
    assert first is not None
    dtype = np.result_type(*{item.signal.logits.dtype for item in scored if item.signal.logits is not None})
    logits_NV, valid_N = _fill(items, lambda signal: signal.logits, (first.shape[1],), dtype, 0)
    return FullTeacher(logits=logits_NV, valid=valid_N)


def _ids_and_logprobs(items: Sequence[Item], scored: Sequence[ScoredRollout], want: SignalSpec) -> OpTeacher:
    K = max(item.signal.ids.shape[1] for item in scored if item.signal.ids is not None)
    K += want.level == "topk"  # a slot for the token itself
    ids_NK, valid_N = _fill(items, lambda signal: signal.ids, (K,), np.int64, -1)
    logprobs_NK, _ = _fill(items, lambda signal: signal.logprobs, (K,), np.float32, -np.inf)
    log_tail_N, _ = _fill(items, lambda signal: signal.log_tail, (), np.float32, 0)
    if want.level == "topk" and not _join_sampled(items, ids_NK.numpy(), logprobs_NK.numpy(), log_tail_N.numpy()):
        ids_NK, logprobs_NK = ids_NK[:, :-1].contiguous(), logprobs_NK[:, :-1].contiguous()
    kind = TopKTeacher if want.level == "topk" else CandidateTeacher
    rows_N = _aligned_rows(items)
    if rows_N is not None:
        valid_N = (rows_N & ALIGNED_ID) > 0
        logprobs_NK, log_tail_N = logprobs_NK.masked_fill(~valid_N[:, None], -torch.inf), log_tail_N.masked_fill(~valid_N, 0)
    return kind(ids=ids_NK, logprobs=logprobs_NK, log_tail=log_tail_N, temperature=want.temperature, valid=valid_N)


def _join_sampled(items: Sequence[Item], ids_NK: np.ndarray, logprobs_NK: np.ndarray, log_tail_N: np.ndarray) -> bool:
    """Put the tokens that are among none of their row's ids into the last column, as `with_sampled` does; whether there is any."""
    rollouts = [rollout_of(item) for item in items]
    own_N = np.fromiter(chain.from_iterable(rollout.token_ids for rollout in rollouts), np.int64, len(ids_NK))
    sampled = _of_tokens(rollouts, [item.signal.sampled if isinstance(item, ScoredRollout) else None for item in items])
    if sampled is None:
        return False
    missing, own_logprobs, left = own_slots(ids_NK, log_tail_N, sampled.numpy(), own_N)
    ids_NK[missing, -1], logprobs_NK[missing, -1], log_tail_N[missing] = own_N[missing], own_logprobs, left
    return bool(missing.size)


def _sampled(items: Sequence[Item], scored: Sequence[ScoredRollout], want: SignalSpec) -> OpTeacher:
    """One number for every token that was sampled: the teacher's logprob, or the advantage of the answer that it is part of."""
    rollouts = [rollout_of(item) for item in items]
    is_judged = want.level == "text"
    values_N, valid_N = _fill(items, lambda signal: signal.advantages if is_judged else signal.sampled, (), np.float32, 0)
    behavior = [np.zeros(len(r), np.float32) if r.logprobs is None else np.asarray(r.logprobs, np.float32) for r in rollouts]
    drawn = torch.from_numpy(np.repeat([r.logprobs is not None for r in rollouts], [len(r) for r in rollouts]))
    return SampledTeacher(
        token_ids=torch.tensor([token for r in rollouts for token in r.token_ids]),
        behavior_logprobs=torch.from_numpy(np.concatenate(behavior)),
        logprobs=None if is_judged else values_N,
        advantages=values_N if is_judged else None,
        temperature=want.temperature,
        valid=drawn if valid_N is None else drawn & valid_N,
    )


def _aligned_rows(items: Sequence[Item]) -> torch.Tensor | None:
    """What each row of signals from a teacher with other tokens holds, [N] flags; None where the teacher has the student's."""
    if not any(isinstance(item, ScoredRollout) and item.signal.rows is not None for item in items):
        return None
    return _fill(items, lambda signal: signal.rows, (), np.uint8, 0)[0]


def _spans(items: Sequence[Item], want: SignalSpec | None) -> SpanTeacher | None:
    """What such signals say beyond those on ids."""
    rows_N = _aligned_rows(items)
    if want is None or rows_N is None:
        return None
    rollouts = [rollout_of(item) for item in items]
    behavior = [np.zeros(len(r), np.float32) if r.logprobs is None else np.asarray(r.logprobs, np.float32) for r in rollouts]
    K = max(item.signal.logprobs.shape[1] for item in items if isinstance(item, ScoredRollout) and item.signal.logprobs is not None)
    is_start_N, is_span_N = (rows_N & ALIGNED_RANK) > 0, (rows_N & ALIGNED_SPAN) > 0
    return SpanTeacher(
        sampled=SampledTeacher(
            token_ids=torch.tensor([token for r in rollouts for token in r.token_ids]),
            behavior_logprobs=torch.from_numpy(np.concatenate(behavior)),
            advantages=_fill(items, lambda signal: signal.advantages, (), np.float32, 0)[0],
            temperature=want.temperature,
            valid=is_span_N,
        ),
        rank_rows=is_start_N.nonzero()[:, 0],
        rank_logprobs=_fill(items, lambda signal: signal.logprobs, (K,), np.float32, -np.inf)[0][is_start_N],
        rank_log_tail=_fill(items, lambda signal: signal.log_tail, (), np.float32, 0)[0][is_start_N],
        valid=is_start_N | is_span_N,
    )


_TEACHERS: dict[Level, Callable[[Sequence[Item], Sequence[ScoredRollout], SignalSpec], OpTeacher]] = {
    "full": _full,
    "topk": _ids_and_logprobs,
    "candidates": _ids_and_logprobs,
    "sampled": _sampled,
    "text": _sampled,
}


def _fill(
    items: Sequence[Item], field: Callable[[TeacherSignal], np.ndarray | None], width: tuple[int, ...], dtype: object, empty: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One tensor [N, *width] of a signal's field, and which of its rows are signals (None: all)."""
    counts = [len(rollout_of(item)) for item in items]
    out = torch.from_numpy(np.empty((sum(counts), *width), dtype=dtype))
    valid_N = np.ones(sum(counts), np.bool_)
    block = out.numpy()  # NumPy copies from the read-only arrays that a codec gives; torch would warn
    start = 0
    for item, count in zip(items, counts, strict=True):
        rows = slice(start, start + count)
        start += count
        if isinstance(item, ScoredRollout):
            values = field(item.signal)
            assert values is not None
            if width:
                block[rows, values.shape[1] :] = empty
                block[rows, : values.shape[1]] = values
            else:
                block[rows] = values
        else:
            block[rows] = empty
            valid_N[rows] = False
    return out, None if valid_N.all() else torch.from_numpy(valid_N)


_FIELDS: dict[Level, tuple[str, ...]] = {
    "full": ("logits",),
    "topk": ("ids", "logprobs", "log_tail"),
    "candidates": ("ids", "logprobs", "log_tail"),
    "sampled": ("sampled",),
    "text": ("advantages",),
}


def _check_signal(item: ScoredRollout, want: SignalSpec) -> None:
    rollout, signal = item.rollout, item.signal
    who = f"teacher signal of rollout {rollout.rollout_id}"
    if signal.level != want.level:
        raise BadAnswerError(f"{who} is of level {signal.level}; {want.level} was asked for")
    if want.level not in ("full", "text") and signal.temperature != want.temperature:
        raise BadAnswerError(f"{who} was taken at temperature {signal.temperature}; {want.temperature} was asked for")
    for name in (*_FIELDS[want.level], *(["reference_logprobs"] if signal.reference_logprobs is not None else [])):
        values = getattr(signal, name)
        if values is None:
            raise BadAnswerError(f"{who} has no {name}, which level {want.level} needs")
        if values.shape[0] != len(rollout):
            raise BadAnswerError(f"{who} has {values.shape[0]} rows of {name} for {len(rollout)} response tokens")
        if values.dtype.kind == "f" and has_nan_or_inf(values):
            raise BadAnswerError(f"{who} holds NaN or +inf in {name}")
    if want.level == "text" and rollout.logprobs is None:
        raise BadAnswerError(f"{who} holds advantages, but nobody says with which logprobs it was sampled: take another rollouts.engine")
    logits_width = {scored.shape[1] for scored in (signal.ids, signal.logprobs) if scored is not None}
    if len(logits_width) > 1:
        raise BadAnswerError(f"{who} has ids and logprobs of different widths: {sorted(logits_width)}")


# ---------------------------------------------------------------- an update cycle


def split_into_steps(items: Sequence[Item], batch_tokens: int, micro_batch_tokens: int, max_seq_len: int) -> list[list[list[Item]]]:
    """An update cycle as optimizer steps of micro-batches: ``steps[i][j]`` is a list for `assemble`.

    Steps hold near-equal numbers of response tokens (cut where the nearest sequence ends), as close to ``batch_tokens`` as a whole
    number of steps comes. The order is that of drawing, labelled sequences and rollouts evenly mixed, whatever the order of ``items``.
    A micro-batch holds at most ``micro_batch_tokens`` packed tokens, or a single longer sequence.

    Raises
    ------
    DataError
        For a sequence longer than ``max_seq_len``, by name.
    """
    for item in items:
        rollout = rollout_of(item)
        if len(rollout.all_ids) > max_seq_len:
            raise DataError(
                f"rollout {rollout.rollout_id} has {len(rollout.prompt.token_ids)} + {len(rollout)} tokens, more than "
                f"train.max_seq_len {max_seq_len}: raise it, or lower rollouts.max_new_tokens or data.prompt_tokens"
            )
    ordered = _interleave(items)
    total = sum(len(rollout_of(item)) for item in ordered)
    count = max(1, round(total / batch_tokens))
    steps: list[list[Item]] = [[] for _ in range(count)]
    before = 0
    for item in ordered:
        length = len(rollout_of(item))
        steps[min(count - 1, (2 * before + length) * count // max(1, 2 * total))].append(item)  # by its middle
        before += length
    return [_micro_batches(step, micro_batch_tokens) for step in steps if step]


def _interleave(items: Sequence[Item]) -> list[Item]:
    def place(group: list[Item]) -> list[tuple[float, int, Item]]:
        group.sort(key=lambda item: (rollout_of(item).draw, rollout_of(item).rollout_id))
        return [((index + 0.5) / len(group), index, item) for index, item in enumerate(group)]

    labelled = place([item for item in items if rollout_of(item).is_labelled])
    rollouts = place([item for item in items if not rollout_of(item).is_labelled])
    return [item for _, _, item in sorted(labelled + rollouts, key=lambda entry: (entry[0], rollout_of(entry[2]).is_labelled, entry[1]))]


def _micro_batches(step: Sequence[Item], micro_batch_tokens: int) -> list[list[Item]]:
    batches: list[list[Item]] = []
    room = 0
    for item in step:
        size = len(rollout_of(item).all_ids)
        if not batches or size > room:
            batches.append([])
            room = micro_batch_tokens
        batches[-1].append(item)
        room -= size
    return batches
