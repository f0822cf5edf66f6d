"""Drawing prompts: by weight, shared out among ranks without overlap, and the same however often it is taken up again."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from bbopd.config import DataConfig
from bbopd.data.draws import PromptStream, Share
from bbopd.types import Prompt


def numbered(count: int, name: str = "p") -> list[Prompt]:
    return [Prompt(f"{name}{i}", (i + 3,), reference_ids=(5,) if i % 3 == 0 else None) for i in range(count)]


MIXED = [*numbered(3, "a"), *numbered(200, "b"), *numbered(50, "c")]
SHARES = (Share(3, 1.0), Share(200, 2.5), Share(50, 0.5))


def ids(prompts: list[Prompt]) -> list[str]:
    return [prompt.prompt_id for prompt in prompts]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_weights_hold_at_any_time_and_on_every_rank(rank: int) -> None:
    stream = PromptStream(MIXED, 3, shares=SHARES, rank=rank, world_size=3)
    drawn = [name[0] for name in ids(stream.next_prompts(4000))]
    for share, name in zip(SHARES, "abc", strict=True):
        counts = np.cumsum([one == name for one in drawn])
        due = share.weight / 4 * np.arange(1, 4001)
        assert np.abs(counts - due).max() < 8  # a fair coin would be 30 and more away from it
    labelled = Counter(name[0] for name in ids(stream.next_labelled(1200)))
    assert all(abs(labelled[name] - 300 * share.weight) < 8 for share, name in zip(SHARES, "abc", strict=True))


def test_each_share_has_epochs_of_its_own() -> None:
    drawn = ids(PromptStream(MIXED, 3, shares=SHARES).next_prompts(2000))
    for name, size in (("a", 3), ("b", 200), ("c", 50)):
        own = [one for one in drawn if one[0] == name]
        epochs = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(epochs) >= 4
        assert all(len(set(epoch)) == size for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) > 1


@pytest.mark.parametrize("shares", [(), SHARES])
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_ranks_share_out_what_one_would_draw(world_size: int, shares: tuple[Share, ...]) -> None:
    alone = PromptStream(MIXED, 5, shares=shares)
    ranks = [PromptStream(MIXED, 5, shares=shares, rank=rank, world_size=world_size) for rank in range(world_size)]
    for take in (1, 7, 40):
        together = [ids(stream.next_prompts(take)) for stream in ranks]
        assert [name for row in zip(*together, strict=True) for name in row] == ids(alone.next_prompts(take * world_size))
        labelled = [ids(stream.next_labelled(take)) for stream in ranks]
        assert [name for row in zip(*labelled, strict=True) for name in row] == ids(alone.next_labelled(take * world_size))
        assert all(stream.position == alone.position for stream in ranks)


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    alone = ids(PromptStream(MIXED, 5, shares=SHARES).next_prompts(120))
    first = [PromptStream(MIXED, 5, shares=SHARES, rank=rank, world_size=4) for rank in range(4)]
    drawn = [name for row in zip(*(ids(stream.next_prompts(15)) for stream in first), strict=True) for name in row]
    then = [PromptStream(MIXED, 5, shares=SHARES, rank=rank, world_size=3) for rank in range(3)]
    for stream in then:
        stream.position = first[0].position
    drawn += [name for row in zip(*(ids(stream.next_prompts(20)) for stream in then), strict=True) for name in row]
    assert drawn == alone


def test_a_position_far_along_is_found_and_so_is_one_before_it() -> None:
    stream = PromptStream(MIXED, 5, shares=SHARES)
    early = ids(stream.next_prompts(50))
    stream.position = {"prompts": 3_000_000, "labelled": 0}
    far = ids(stream.next_prompts(50))
    assert {name[0] for name in far} == {"a", "b", "c"}
    stream.position = {"prompts": 0, "labelled": 0}
    assert ids(stream.next_prompts(50)) == early
    again = PromptStream(MIXED, 5, shares=SHARES)
    again.position = {"prompts": 3_000_000, "labelled": 0}
    assert ids(again.next_prompts(50)) == far


def test_shares_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="rank 2 of world_size 2: ranks count from 0 to 1"):
        DataConfig(rank=2, world_size=2)
    with pytest.raises(ValueError, match="weight is given to demo but not to every source"):
        DataConfig.model_validate({"prompts": [{"demo": True, "weight": 2}, {"jsonl": "a"}]})
    with pytest.raises(ValueError, match="give exactly one of demo, jsonl, parquet, text, dataset; got"):
        DataConfig.model_validate({"prompts": [{"parquet": "a", "jsonl": "a"}]})
