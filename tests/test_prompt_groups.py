"""Groups go on when their last member is accepted or rejected, whole, in the order of drawing, whatever order they come in."""

from __future__ import annotations

import numpy as np

from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.types import Group, Prompt, Rollout


def answers(names: str, first: int = 0) -> tuple[list[Prompt], list[Rollout]]:
    prompts = [Prompt(name, (1,)) for name in names]
    return prompts, [Rollout(f"{prompt.prompt_id}#{first + n}", prompt, (1,), draw=first + n) for n, prompt in enumerate(prompts)]


def test_any_order_of_arrival_and_any_rejections_give_the_same_groups() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        prompts, rollouts = answers("aaabbbbcd", first=100)
        is_rejected = random.random(len(rollouts)) < 0.4
        groups = PromptGroups(prompts, first=100, by_group=True)
        passed: list[list[Rollout]] = []
        for n in random.permutation(len(rollouts)):
            ready = groups.reject(100 + n) if is_rejected[n] else groups.accept(rollouts[n])
            passed += [ready] if ready else []
        kept = [
            [rollout.draw for rollout, bad in zip(rollouts, is_rejected, strict=True) if not bad and rollout.prompt.prompt_id == name]
            for name in "abcd"
        ]
        assert sorted([rollout.draw for rollout in group] for group in passed) == sorted(draws for draws in kept if draws)
        for group in passed:
            assert {rollout.group for rollout in group} == {Group(group[0].group.number, len(group))}
        assert {group[0].prompt.prompt_id: group[0].group.number for group in passed}.items() <= {
            "a": 100,
            "b": 103,
            "c": 107,
            "d": 108,
        }.items()


def test_nothing_goes_on_before_the_last_member() -> None:
    prompts, rollouts = answers("aaab")
    groups = PromptGroups(prompts, by_group=True)
    assert groups.accept(rollouts[2]) == []
    assert groups.reject(0) == []
    assert [rollout.draw for rollout in groups.accept(rollouts[3])] == [3]
    assert [rollout.draw for rollout in groups.accept(rollouts[1])] == [1, 2]
    assert PromptGroups(prompts, by_group=True).reject(3) == [], "a group of none is none"


def test_without_groups_each_goes_on_at_once_as_it_is() -> None:
    prompts, rollouts = answers("aab")
    groups = PromptGroups(prompts, by_group=False)
    assert groups.accept(rollouts[1]) == [rollouts[1]]
    assert groups.reject(0) == []
    assert groups.accept(rollouts[2])[0].group is None
