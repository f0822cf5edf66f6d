"""Filters: every reason, on answers made for it, and the record of the rejected."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bbopd.config import FiltersConfig
from bbopd.data.filters import RejectedLog, RolloutFilter, repeated_share
from bbopd.errors import DataError
from bbopd.types import FinishReason, Prompt, Rollout

EOS = 0


def rollout(ids: tuple[int, ...], prompt: tuple[int, ...] = (9,), finish_reason: FinishReason = "stop", draw: int = 0) -> Rollout:
    return Rollout(f"p#{draw}", Prompt("p", prompt), ids, finish_reason=finish_reason, draw=draw)


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
    assert judge.check(rollout(ids, finish_reason=finish_reason)) == reason


def test_truncated_answers_pass_by_default() -> None:
    judge = RolloutFilter(FiltersConfig(), [EOS])
    assert judge.check(rollout((1, 2, 3, 4, 5), finish_reason="length")) is None


def test_duplicates_are_of_one_prompt_and_one_cycle() -> None:
    judge = RolloutFilter(FiltersConfig(min_tokens=1), [EOS])
    same = (4, 5, 6)
    assert judge.check(rollout(same)) is None
    assert judge.check(rollout((*same, EOS), draw=1)) == "duplicate"
    assert judge.check(rollout(same, prompt=(8,), draw=2)) is None
    assert judge.check(rollout((4, 5, 7), draw=3)) is None
    judge.start_cycle()
    assert judge.check(rollout(same, draw=4)) is None
    allowing = RolloutFilter(FiltersConfig(min_tokens=1, reject_duplicates=False), [EOS])
    assert [allowing.check(rollout(same)) for _ in range(2)] == [None, None]


@pytest.mark.parametrize(
    ("ids", "n", "share"),
    [((), 4, 0.0), ((1, 2, 3), 4, 0.0), ((1, 1, 1, 1, 1), 4, 0.5), ((7,) * 103, 4, 0.99), ((1, 2, 3, 1, 2, 3), 3, 0.25)],
)
def test_repeated_share(ids: tuple[int, ...], n: int, share: float) -> None:
    assert repeated_share(ids, n) == pytest.approx(share)


def test_rejected_rollouts_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rejected.jsonl"
    with RejectedLog(path, decode=lambda ids: " ".join(map(str, ids))) as log:
        log.write(rollout((1, 2)), "too_short")
        assert json.loads(path.read_text())["response"] == "1 2"  # flushed at once
    with RejectedLog(path) as log:
        log.write(rollout((), draw=1), "empty")
    first, second = map(json.loads, path.read_text().splitlines())
    assert (first["rollout_id"], first["reason"], first["token_ids"], first["prompt"]) == ("p#0", "too_short", [1, 2], "9")
    assert (second["rollout_id"], second["reason"], second["prompt_token_ids"]) == ("p#1", "empty", [9])
    assert "response" not in second
    with pytest.raises(DataError, match="cannot write"):
        RejectedLog(path / "below-a-file.jsonl")


def test_a_disk_that_takes_no_more_is_said_with_the_way_out() -> None:
    log = RejectedLog(Path("/dev/full"))
    with pytest.raises(DataError, match="cannot write rejected rollouts to /dev/full: No space left on device; free some space there"):
        log.write(rollout((1, 2)), "too_short")
    with pytest.raises(DataError, match="No space left on device"):
        log.close()  # the line is still in its buffer
