"""Packing and splitting against plain loops over the sequences they were made from."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from bbopd.data.assemble import assemble, rollout_of, split_into_steps
from bbopd.errors import BadAnswerError, DataError
from bbopd.rpc.signals import with_sampled
from bbopd.types import (
    CandidateTeacher,
    FullTeacher,
    Level,
    Prompt,
    Rollout,
    SampledTeacher,
    ScoredRollout,
    SignalSpec,
    TeacherSignal,
    TopKTeacher,
)

V = 23


def make_rollout(
    random: np.random.Generator, draw: int, labelled: bool = False, prompt_length: int | None = None, length: int | None = None
) -> Rollout:
    prompt_length = prompt_length or int(random.integers(1, 9))
    length = length or int(random.integers(1, 12))
    return Rollout(
        rollout_id=f"{'x' if labelled else 'r'}#{draw}",
        prompt=Prompt("p", tuple(random.integers(0, V, prompt_length).tolist())),
        token_ids=tuple(random.integers(0, V, length).tolist()),
        origin="reference" if labelled else "student",
        logprobs=None if labelled else random.normal(size=length).astype(np.float32),
        draw=draw,
    )


def score(random: np.random.Generator, rollout: Rollout, level: Level, K: int = 4, dtype: type = np.float16) -> ScoredRollout:
    L = len(rollout)

    def values(*shape: int) -> np.ndarray:  # read-only, as a codec gives them
        return np.frombuffer(random.normal(size=shape).astype(np.float32).tobytes(), dtype=np.float32).reshape(shape)

    if level == "full":
        signal = TeacherSignal(level, logits=np.frombuffer(values(L, V).astype(dtype).tobytes(), dtype).reshape(L, V))
    elif level == "sampled":
        signal = TeacherSignal(level, sampled=values(L))
    else:
        ids = np.stack([random.permutation(V)[:K] for _ in range(L)]).astype(np.int32)
        signal = TeacherSignal(level, ids=ids, logprobs=values(L, K), log_tail=values(L), sampled=values(L))
    return ScoredRollout(rollout, signal)


def mixed(seed: int, count: int = 7) -> list[Rollout]:
    random = np.random.default_rng(seed)
    return [make_rollout(random, draw, labelled=bool(random.integers(2))) for draw in range(count)]


@pytest.mark.parametrize("seed", range(5))
def test_every_row_predicts_its_own_token(seed: int) -> None:
    rollouts = mixed(seed)
    batch = assemble(rollouts, None)
    assert batch.teacher is None
    row = 0
    for index, rollout in enumerate(rollouts):
        start, end = batch.boundaries[index : index + 2].tolist()
        assert tuple(batch.input_ids[start:end].tolist()) == rollout.all_ids
        assert batch.position_ids[start:end].tolist() == list(range(end - start))
        for i, token in enumerate(rollout.token_ids):
            at = int(batch.target_rows[row])
            assert at == start + len(rollout.prompt.token_ids) - 1 + i
            assert int(batch.input_ids[at + 1]) == int(batch.target_ids[row]) == token
            assert int(batch.labels[row]) == (token if rollout.is_labelled else -100)
            row += 1
    assert row == batch.response_tokens == len(batch.target_rows) == len(batch.token_weight)
    assert batch.rollout_tokens == sum(len(r) for r in rollouts if not r.is_labelled)
    assert batch.packed_tokens == int(batch.boundaries[-1]) == sum(len(r.all_ids) for r in rollouts)
    assert (batch.token_weight == 1).all()
    kinds = [batch.input_ids.dtype, batch.position_ids.dtype, batch.boundaries.dtype, batch.target_rows.dtype, batch.labels.dtype]
    assert kinds == [torch.int64, torch.int64, torch.int32, torch.int64, torch.int64]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_full_logits_keep_rows_and_precision(dtype: type) -> None:
    random = np.random.default_rng(1)
    scored = [score(random, rollout, "full", dtype=dtype) for rollout in mixed(3)]
    teacher = assemble(scored, SignalSpec("full", temperature=2.0)).teacher
    assert isinstance(teacher, FullTeacher)
    assert teacher.valid is None
    assert teacher.logits is not None
    np.testing.assert_array_equal(teacher.logits.numpy(), np.concatenate([item.signal.logits for item in scored]))
    assert teacher.logits.numpy().dtype == dtype


@pytest.mark.parametrize(("level", "kind"), [("topk", TopKTeacher), ("candidates", CandidateTeacher)])
def test_ids_and_logprobs_of_unequal_width_and_sequences_without_a_signal(level: Level, kind: type) -> None:
    random = np.random.default_rng(2)
    rollouts = mixed(4)
    items = [score(random, r, level, K=3 + r.draw % 3) if r.draw != 2 else r for r in rollouts]
    items = [replace(i, signal=replace(i.signal, sampled=None)) if isinstance(i, ScoredRollout) else i for i in items]
    teacher = assemble(items, SignalSpec(level, top_k=5)).teacher
    assert isinstance(teacher, kind)
    assert isinstance(teacher, TopKTeacher | CandidateTeacher)
    assert teacher.valid is not None
    row = 0
    for item in items:
        for i in range(len(rollout_of(item))):
            valid = isinstance(item, ScoredRollout)
            assert bool(teacher.valid[row]) == valid
            width = 0
            if isinstance(item, ScoredRollout):
                width = item.signal.ids.shape[1]
                assert teacher.ids[row, :width].tolist() == item.signal.ids[i].tolist()
                np.testing.assert_array_equal(teacher.logprobs[row, :width].numpy(), item.signal.logprobs[i])
                assert float(teacher.log_tail[row]) == float(item.signal.log_tail[i])
            assert (teacher.ids[row, width:] == -1).all()
            assert (teacher.logprobs[row, width:] == -torch.inf).all()
            row += 1


def test_sampled_is_valid_where_the_student_drew() -> None:
    random = np.random.default_rng(5)
    items = [score(random, make_rollout(random, draw, labelled=draw == 1), "sampled") for draw in range(3)]
    teacher = assemble(items, SignalSpec("sampled")).teacher
    assert isinstance(teacher, SampledTeacher)
    assert teacher.token_ids.tolist() == [token for item in items for token in item.rollout.token_ids]
    np.testing.assert_array_equal(teacher.logprobs.numpy(), np.concatenate([item.signal.sampled for item in items]))
    drawn = np.concatenate([np.full(len(item.rollout), not item.rollout.is_labelled) for item in items])
    assert teacher.valid is not None
    np.testing.assert_array_equal(teacher.valid.numpy(), drawn)
    logprobs = [item.rollout.logprobs for item in items if item.rollout.logprobs is not None]
    np.testing.assert_array_equal(teacher.behavior_logprobs.numpy()[drawn], np.concatenate(logprobs))


def test_advantages_are_signals_of_what_was_judged_alone() -> None:
    random = np.random.default_rng(0)
    text = SignalSpec("text", temperature=0.7)
    rollouts = [make_rollout(random, draw, labelled=draw % 3 == 1) for draw in range(6)]
    judged = [None if rollout.is_labelled else random.normal(size=len(rollout)).astype(np.float32) for rollout in rollouts]
    items = [ScoredRollout(rollout, TeacherSignal("text", advantages=given)) for rollout, given in zip(rollouts, judged, strict=True)]
    teacher = assemble([*items, rollouts[1]], text).teacher
    assert isinstance(teacher, SampledTeacher)
    assert teacher.logprobs is None
    assert teacher.temperature == 0.7
    expected = [
        given is not None for given, rollout in zip([*judged, None], [*rollouts, rollouts[1]], strict=True) for _ in rollout.token_ids
    ]
    assert teacher.valid.tolist() == expected
    np.testing.assert_array_equal(
        teacher.advantages[teacher.valid].numpy(), np.concatenate([given for given in judged if given is not None])
    )
    behavior = np.concatenate([rollout.logprobs for rollout in rollouts if rollout.logprobs is not None])
    np.testing.assert_array_equal(teacher.behavior_logprobs[teacher.valid].numpy(), behavior)
    assert assemble([items[1], rollouts[1]], text).teacher is None
    for advantages, error in (
        (judged[0][:0], "0 rows of advantages for"),
        (np.full_like(judged[0], np.nan), r"NaN or \+inf in advantages"),
    ):
        with pytest.raises(BadAnswerError, match=error):
            assemble([ScoredRollout(rollouts[0], TeacherSignal("text", advantages=advantages))], text)
    unknown = ScoredRollout(dataclasses.replace(rollouts[0], logprobs=None), items[0].signal)
    with pytest.raises(BadAnswerError, match="nobody says with which logprobs it was sampled"):
        assemble([unknown], text)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf])
def test_bad_numbers_name_the_rollout(dtype: type, value: float) -> None:
    random = np.random.default_rng(6)
    items = [score(random, rollout, "full", dtype=dtype) for rollout in mixed(7)]
    logits = items[3].signal.logits.copy()
    logits[-1, 5] = -np.inf  # a token the teacher excludes is no error
    items[3] = ScoredRollout(items[3].rollout, TeacherSignal("full", logits=logits))
    assemble(items, SignalSpec("full"))
    logits[-1, 5] = np.copysign(np.float64(value), value)
    with pytest.raises(BadAnswerError, match=items[3].rollout.rollout_id + r" .*NaN or \+inf in logits"):
        assemble(items, SignalSpec("full"))


def test_signals_that_do_not_fit_are_refused() -> None:
    random = np.random.default_rng(8)
    rollout = make_rollout(random, 0, length=5)
    good = score(random, rollout, "topk")
    with pytest.raises(BadAnswerError, match="level topk; full"):
        assemble([good], SignalSpec("full"))
    with pytest.raises(BadAnswerError, match=r"temperature 1.0; 2.0"):
        assemble([good], SignalSpec("topk", temperature=2.0))
    short = TeacherSignal("topk", ids=good.signal.ids[:4], logprobs=good.signal.logprobs[:4], log_tail=good.signal.log_tail[:4])
    with pytest.raises(BadAnswerError, match="4 rows of ids for 5 response tokens"):
        assemble([ScoredRollout(rollout, short)], SignalSpec("topk"))
    with pytest.raises(BadAnswerError, match="no log_tail"):
        assemble([ScoredRollout(rollout, TeacherSignal("topk", ids=good.signal.ids, logprobs=good.signal.logprobs))], SignalSpec("topk"))
    with pytest.raises(ValueError, match="empty response"):
        assemble([Rollout("r", Prompt("p", (1,)), ())], None)
    with pytest.raises(ValueError, match="at least one"):
        assemble([], None)


# ---------------------------------------------------------------- splitting


@pytest.mark.parametrize("seed", range(20))
def test_splitting_loses_and_repeats_nothing_and_balances(seed: int) -> None:
    random = np.random.default_rng(seed)
    items = [
        make_rollout(random, draw, labelled, int(random.integers(1, 60)), int(random.integers(1, 200)))
        for labelled in (True, False)
        for draw in range(int(random.integers(1, 30)))
    ]
    batch_tokens, micro = int(random.integers(200, 3000)), int(random.integers(100, 1500))
    steps = split_into_steps(items, batch_tokens, micro, 1024)
    flat = [item for step in steps for micro_batch in step for item in micro_batch]
    assert sorted(map(id, flat)) == sorted(map(id, items))
    assert all(micro_batch for step in steps for micro_batch in step)

    total, longest = sum(map(len, items)), max(map(len, items))
    count = max(1, round(total / batch_tokens))
    sizes = [sum(len(item) for micro_batch in step for item in micro_batch) for step in steps]
    assert len(steps) <= count
    assert max(abs(size - total / count) for size in sizes) <= longest or len(steps) < count
    for step in steps:
        for micro_batch in step:
            assert sum(len(item.all_ids) for item in micro_batch) <= micro or len(micro_batch) == 1
        for first, second in itertools.pairwise(step):  # no micro-batch could take in the next one's first sequence
            assert sum(len(item.all_ids) for item in first) + len(second[0].all_ids) > micro

    for origin in ("student", "reference"):
        draws = [item.draw for item in flat if item.origin == origin]
        assert draws == sorted(draws)
    shuffled = [items[i] for i in random.permutation(len(items))]
    assert split_into_steps(shuffled, batch_tokens, micro, 1024) == steps


def test_a_cycle_of_5000_tokens_gives_near_equal_steps() -> None:
    random = np.random.default_rng(0)
    items = [make_rollout(random, draw, labelled=draw % 2 == 0, prompt_length=10, length=100) for draw in range(50)]
    steps = split_into_steps(items, 2048, 10_000, 1024)
    assert [sum(len(item) for micro_batch in step for item in micro_batch) for step in steps] == [2500, 2500]
    for step in steps:
        assert abs(sum(item.is_labelled for micro_batch in step for item in micro_batch) - 12.5) <= 1


def test_too_long_a_sequence_is_named() -> None:
    rollout = make_rollout(np.random.default_rng(0), 4, prompt_length=30, length=40)
    with pytest.raises(DataError, match=r"r#4 has 30 \+ 40 tokens, more than train.max_seq_len 64"):
        split_into_steps([rollout], 100, 100, 64)
    assert split_into_steps([], 100, 100, 64) == []


def test_a_topk_support_holds_the_token_itself():
    """Where the token is none of the K ids it leaves the tail, and no mass is made or lost; against dense float64."""
    random = np.random.default_rng(4)
    L, V, K = 40, 30, 4
    log_p = random.standard_normal((L, V)) * 2
    log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
    own = random.integers(0, V, L)
    ids = np.argsort(-log_p, axis=1)[:, :K].astype(np.int32)
    rest = log_p.copy()
    np.put_along_axis(rest, ids, -np.inf, axis=1)
    signal = TeacherSignal(
        "topk",
        ids=ids,
        logprobs=np.take_along_axis(log_p, ids, 1).astype(np.float32),
        log_tail=np.log(np.exp(rest).sum(axis=1)).astype(np.float32),
        sampled=np.take_along_axis(log_p, own[:, None], 1)[:, 0].astype(np.float32),
    )
    joined = with_sampled(signal, tuple(own))
    missing = (ids != own[:, None]).all(axis=1)
    assert 0 < missing.sum() < L
    assert joined.ids.shape == (L, K + 1)
    np.testing.assert_array_equal(joined.ids[:, :K], ids)
    np.testing.assert_array_equal(joined.ids[:, K], np.where(missing, own, -1))
    for row in range(L):
        live = joined.ids[row][joined.ids[row] >= 0]
        np.testing.assert_allclose(joined.logprobs[row][joined.ids[row] >= 0], log_p[row, live], atol=1e-5)
        outside = np.setdiff1d(np.arange(V), live)
        np.testing.assert_allclose(joined.log_tail[row], np.log(np.exp(log_p[row, outside]).sum()), atol=1e-5)
    item = ScoredRollout(Rollout("r", Prompt("p", (1,)), tuple(own.tolist())), signal)
    batch = assemble([item], SignalSpec("topk", top_k=K))
    assert (batch.teacher.ids == batch.target_ids[:, None]).any(1).all()


@pytest.mark.parametrize(("sampled", "log_tail"), [(-1.0, -1.5), (-np.inf, -np.inf), (-2.0, -2.0), (-np.inf, -0.5)])
def test_a_token_with_all_of_the_tail_leaves_none(sampled, log_tail):
    kept = np.log1p(-np.exp(log_tail))
    arrays = {"ids": [[3]], "logprobs": [[kept]], "log_tail": [log_tail], "sampled": [sampled]}
    types = {"ids": np.int32}
    signal = TeacherSignal("topk", **{name: np.array(value, types.get(name, np.float32)) for name, value in arrays.items()})
    joined = with_sampled(signal, (7,))
    assert joined.ids.tolist() == [[3, 7]]
    np.testing.assert_allclose(np.exp(joined.logprobs).sum() + np.exp(joined.log_tail).sum(), 1.0, rtol=1e-6)
    assert not np.isnan(joined.logprobs).any()
    assert joined.log_tail[0] == (-np.inf if sampled >= log_tail else np.float32(log_tail))
