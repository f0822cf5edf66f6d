"""The wire benchmark's own parts: every encoding gives back what was put in, and its table says which was how much faster."""

from __future__ import annotations

import numpy as np
import pytest

from bbopd.rpc.signals import check_signal
from benchmarks import rates
from benchmarks.scoring import SAMPLES, Shape
from benchmarks.server_memory import measure
from benchmarks.wire import BBOPD, Batches, Contest, bytes_per_token
from benchmarks.wire_load import VOCAB, WANT, Load
from benchmarks.wire_peers import PEERS
from benchmarks.wire_server import server_process


@pytest.fixture(scope="module")
def load() -> Load:
    return Load()


def test_every_answer_is_one_that_a_teacher_may_give(load):
    first = load.rollouts(4000)
    assert sum(map(len, first)) >= 4000
    rollouts = [*first, *load.rollouts(4000)]
    assert len({rollout.all_ids for rollout in rollouts}) == len(rollouts)
    for rollout in rollouts:
        check_signal(load.answer(rollout.rollout_id), WANT, np.array(rollout.token_ids), VOCAB)


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_gives_back_what_was_put_in(load, peer):
    rollout = load.rollouts(1)[0]
    assert peer.decode_question(peer.encode_question(rollout)) == rollout.rollout_id
    rollout_id, signal = peer.decode_answer(peer.encode_answer(rollout.rollout_id, load))
    assert rollout_id == rollout.rollout_id
    if signal is not None:
        check_signal(signal, WANT, np.array(rollout.token_ids), VOCAB)
        expected = load.answer(rollout.rollout_id)
        for name in ("ids", "logprobs", "log_tail", "sampled"):
            np.testing.assert_allclose(getattr(signal, name), getattr(expected, name), rtol=1e-6)


@pytest.mark.timeout(600)
async def test_a_round_trip_and_its_bytes(load):
    with server_process(BBOPD) as port:
        contest = Contest({BBOPD: port}, load)
        done = await contest.run(BBOPD, 20_000)
        assert done.tokens >= 20_000
        assert done.batches == 2
        answers, questions = await bytes_per_token(contest, BBOPD)
    assert 392 < answers < answers + questions < 400  # at V = 128,256, framing, checksums and hashes included


def test_ratios_are_of_the_same_round(tmp_path):
    runners = [rates.Runner("one", rates=[100.0, 10.0], figures={"bytes a token": "392"}), rates.Runner("two", "slow", rates=[50.0, 5.0])]
    runners.append(rates.Runner("three", skipped="not installed"))
    for _ in range(2):
        path = rates.publish("wire", "a task", runners, "two processes", tmp_path)
    told = [rate.ratio for rate in rates.read(path.with_suffix(".csv"))]
    assert told == [1.0, 0.5, None]
    text = path.read_text()
    assert "| two | 28 | 50 | 0.5 (0.5 to 0.5) | – | slow |" in text
    assert "skipped: not installed" in text


def test_batches_hold_every_answer_once(load):
    from bbopd.types import ScoredRollout

    batches, rollouts = Batches(), load.rollouts(40_000)
    for rollout in rollouts:
        batches.add(ScoredRollout(rollout, load.answer(rollout.rollout_id)))
    batches.finish()
    assert batches.tokens == sum(map(len, rollouts))
    assert batches.count == 3


def test_shapes_to_score_differ_by_seed_and_share_their_prompts():
    shape = Shape(prompt=5, answer=3, prompts=4)
    first, second = shape.rollouts(50, 0), shape.rollouts(50, 1)
    assert len(first) == SAMPLES * 4
    assert {len(rollout.all_ids) for rollout in first} == {8}
    assert len({rollout.prompt for rollout in first}) == 4
    assert len({rollout.prompt for rollout in shape.rollouts(50, 2, is_shared=False)}) == len(first)
    assert len({rollout.all_ids for rollout in [*first, *second]}) == 2 * len(first)


@pytest.mark.timeout(600)
async def test_memory_of_a_server_is_looked_at_from_outside():
    found = await measure(requests=100)
    assert list(found.at) == [100]
    assert 20 < found.at[100] < 2000
