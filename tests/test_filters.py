"""Filters: every reason, on answers made for it, and the record of the rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbopd.config import FiltersConfig
from bbopd.data.filters import KeptShare, RolloutFilter, repeated_share
from bbopd.data.rejected import RejectedLog, Rejection
from bbopd.errors import DataError, RolloutsRejectedError
from bbopd.types import FinishReason, Prompt, Rollout

EOS = 0


def rollout(ids: tuple[int, ...], prompt: tuple[int, ...] = (9,), finish_reason: FinishReason = "stop", draw: int = 0) -> Rollout:
    return Rollout(f"p#{draw}", Prompt("p", prompt), ids, finish_reason=finish_reason, draw=draw)


def reason_for(judge: RolloutFilter, candidate: Rollout) -> str | None:
    rejection = judge.check(candidate)
    return None if rejection is None else rejection.reason


@pytest.mark.parametrize(
    ("ids", "finish_reason", "reason"),
    [
        ((), "stop", "empty"),
        ((EOS,), "stop", "empty"),
        ((1, 2, EOS), "stop", "too_short"),
        ((1, 2, 3, EOS), "stop", None),
        ((1, 2, 3), "length", "truncated"),
        ((*tuple(range(1, 11)), EOS), "stop", None),
        ((*tuple(range(1, 12)), EOS), "stop", "too_long"),
        ((1, 2, 1, 2, 1, 2, 1, EOS), "stop", "repetition"),  # 4 of 6 bigrams seen before
        ((1, 2, 1, 2, 1, EOS), "stop", None),  # 2 of 4
    ],
)
def test_reasons(ids: tuple[int, ...], finish_reason: FinishReason, reason: str | None) -> None:
    config = FiltersConfig(min_tokens=3, max_tokens=10, reject_truncated=True, max_repetition=0.6, repetition_ngram=2)
    judge = RolloutFilter(config, [EOS])
    assert reason_for(judge, rollout(ids, finish_reason=finish_reason)) == reason


def test_an_answer_without_eos() -> None:
    judge = RolloutFilter(FiltersConfig(reject_no_eos=True), [EOS, 6])
    assert reason_for(judge, rollout((1, 2, 3, 4, 5))) == "no_eos"
    assert reason_for(judge, rollout((1, 2, 3, 4, 5), finish_reason="length")) == "no_eos"
    assert reason_for(judge, rollout((1, 2, 3, 4, 6))) is None


def test_what_was_measured_and_what_was_allowed() -> None:
    judge = RolloutFilter(FiltersConfig(min_tokens=3, max_tokens=9, max_repetition=0.5, repetition_ngram=2), [EOS])
    assert judge.check(rollout((1, 2))) == Rejection("too_short", 2, 3)
    assert judge.check(rollout(tuple(range(1, 12)))) == Rejection("too_long", 11, 9)
    assert judge.check(rollout((1, 2, 1, 2, 1, 2, 1))) == Rejection("repetition", round(4 / 6, 4), 0.5)


def test_truncated_answers_pass_by_default() -> None:
    judge = RolloutFilter(FiltersConfig(), [EOS])
    assert reason_for(judge, rollout((1, 2, 3, 4, 5), finish_reason="length")) is None


def test_duplicates_are_of_one_prompt_and_one_cycle() -> None:
    judge = RolloutFilter(FiltersConfig(min_tokens=1), [EOS])
    same = (4, 5, 6)
    assert reason_for(judge, rollout(same)) is None
    assert reason_for(judge, rollout((*same, EOS), draw=1)) == "duplicate"
    assert reason_for(judge, rollout(same, prompt=(8,), draw=2)) is None
    assert reason_for(judge, rollout((4, 5, 7), draw=3)) is None
    judge.start_cycle()
    assert reason_for(judge, rollout(same, draw=4)) is None
    allowing = RolloutFilter(FiltersConfig(min_tokens=1, reject_duplicates=False), [EOS])
    assert [reason_for(allowing, rollout(same)) for _ in range(2)] == [None, None]


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [((), 4, 0.0), ((1, 2, 3), 4, 0.0), ((1, 1, 1, 1, 1), 4, 0.5), ((7,) * 103, 4, 0.99), ((1, 2, 3, 1, 2, 3), 3, 0.25)],
)
def test_repeated_share(ids: tuple[int, ...], n: int, share: float) -> None:
    assert repeated_share(ids, n) == pytest.approx(share)


def test_rejected_rollouts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rejected.jsonl"
    with RejectedLog(path, decode=lambda ids: " ".join(map(str, ids))) as log:
        log.write(rollout((1, 2)), Rejection("too_short", 2, 4, "two of four"))
        assert json.loads(path.read_text())["response"] == "1 2"  # flushed at once
    with RejectedLog(path) as log:
        log.write(rollout((), draw=1), Rejection("empty"))
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["rollout_id"], first["reason"], first["token_ids"], first["prompt"]) == ("p#0", "too_short", [1, 2], "9")
    assert (first["figure"], first["limit"], first["detail"], first["response"]) == (2, 4, "two of four", "1 2")
    assert (second["rollout_id"], second["reason"], second["prompt_token_ids"]) == ("p#1", "empty", [9])
    assert "response" not in second
    with pytest.raises(DataError, match="cannot write"):
        RejectedLog(path / "below-a-file.jsonl")


def test_a_disk_that_takes_no_more_is_said_with_the_way_out() -> None:
    log = RejectedLog(Path("/dev/full"))
    with pytest.raises(DataError, match="cannot write rejected rollouts to /dev/full: No space left on device; free some space there"):
        log.write(rollout((1, 2)), Rejection("too_short"))
    with pytest.raises(DataError, match="No space left on device"):
        log.close()  # the line is still in its buffer


def test_the_record_of_the_rejected_is_bounded_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "rejected.jsonl"
    for _ in range(2):  # taken up again, it stays so
        with RejectedLog(path, max_bytes=2000) as log:
            for draw in range(20):
                log.write(rollout((1, 2), draw=draw), Rejection("too_short", 2, 4))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.stat().st_size < 2000 + 2 * 250
    assert [line["reason"] for line in lines[:5]] == ["too_short"] * 5
    assert (lines[-1]["reason"], lines[-1]["limit"], lines[-1]["weights_version"]) == ("full", 2000, 0)
    assert "data.filters.quarantine_bytes" in lines[-1]["detail"]


def test_a_run_stops_when_too_few_rollouts_pass() -> None:
    kept = KeptShare(0.3, 10)
    for _ in range(3):
        kept.count(None)
    for _ in range(7):  # 3 of 10 is just enough
        kept.count(Rejection("repetition"))
    kept.count(None)  # 3 again: the oldest has left
    with pytest.raises(
        RolloutsRejectedError, match=r"2 of the last 10 .*20\.0%; data\.filters\.min_kept is 30\.0%\): repetition 7, language 1"
    ):
        kept.count(Rejection("language"))
    short = KeptShare(0.9, 10)
    for _ in range(9):  # not a whole window yet
        short.count(Rejection("repetition"))
    never = KeptShare(0.0, 3)
    for _ in range(9):
        never.count(Rejection("repetition"))
