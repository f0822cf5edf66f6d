"""Groups of answers, judged: exact advantages, named faults, and no group ever waits for itself, on a virtual clock."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from copy import deepcopy

import numpy as np
import pytest

from bbopd.data.streams import each
from bbopd.errors import BadAnswerError, BudgetSpentError, TeacherError
from bbopd.objectives.group_advantages import group_advantages
from bbopd.pipeline.prompt_groups import PromptGroups
from bbopd.pipeline.rewards import GroupRewards
from bbopd.pipeline.state import RunState
from bbopd.planning.virtual_clock import run_virtually
from bbopd.types import Prompt, Reward, Rollout, ScoredRollout, SignalSpec, Unscored
from tests.simulated import Durations, OpenGate, Simulation, simulate, simulated_config

TEXT = SignalSpec("text")


def value_of(rollout: Rollout) -> float:
    return float(np.random.default_rng(rollout.draw).normal())


class TimedJudge:
    """Takes its time; leaves unscored what ``skips`` says, fails at one group, and remembers what it was asked."""

    def __init__(self, *, seconds=lambda group: 1.0, skips=lambda rollout: False, fail_at: int = -1, error=TeacherError) -> None:
        self._seconds, self._skips, self._fail_at, self._error = seconds, skips, fail_at, error
        self.groups: list[Sequence[Rollout]] = []
        self.running = self.most_at_once = self.finished = 0

    async def rewards(self, group: Sequence[Rollout]) -> Sequence[Reward | Unscored]:
        self.groups.append(group)
        self.running += 1
        self.most_at_once = max(self.most_at_once, self.running)
        number = len(self.groups)
        try:
            await asyncio.sleep(self._seconds(group))
        finally:
            self.running -= 1
        if number == self._fail_at:
            raise self._error("the judge was told to fail")
        self.finished += 1
        return [
            Unscored(rollout, "ungraded", "no") if self._skips(rollout) else Reward(value_of(rollout), {"half": 0.5}) for rollout in group
        ]


def grouped(sizes: Sequence[int], length: int = 4) -> list[Rollout]:
    prompts = [Prompt(f"p{number}", (1,)) for number, size in enumerate(sizes) for _ in range(size)]
    groups = PromptGroups(prompts, by_group=True)
    rollouts = [Rollout(f"r{draw}", prompt, (1,) * length, logprobs=np.zeros(length), draw=draw) for draw, prompt in enumerate(prompts)]
    return [ready for rollout in rollouts for ready in groups.accept(rollout)]


async def judged(stage: GroupRewards, rollouts: Sequence[Rollout]) -> list[ScoredRollout | Unscored]:
    return sorted([one async for one in stage.score(each(rollouts), TEXT)], key=lambda one: one.rollout.draw)


# ------------------------------------------------------------ the stage


@pytest.mark.parametrize("divide_by_std", [True, False])
def test_every_token_has_the_advantage_of_its_answer_in_its_group(divide_by_std: bool) -> None:
    random = np.random.default_rng(0)
    sizes = [int(size) for size in random.integers(1, 9, 20)]
    rollouts = grouped(sizes)
    labelled = Rollout("l", Prompt("q", (1,)), (1, 2), origin="reference", draw=9999)
    mixed = [rollouts[n] for n in random.permutation(len(rollouts))]  # members of many groups in any order
    mixed.insert(5, labelled)
    judge = TimedJudge(seconds=lambda group: float(random.random()))
    found = run_virtually(judged(GroupRewards(judge, divide_by_std=divide_by_std, inflight_tokens=60), mixed))
    assert found.pop().signal.advantages is None
    assert [one.rollout for one in found] == rollouts
    start = 0
    for size in sizes:
        members = found[start : start + size]
        expected = group_advantages([value_of(one.rollout) for one in members], divide_by_std=divide_by_std)
        for one, advantage in zip(members, expected, strict=True):
            assert one.signal.advantages.dtype == np.float32
            assert one.signal.advantages.tolist() == [np.float32(advantage)] * len(one.rollout)
            assert one.reward == Reward(value_of(one.rollout), {"half": 0.5})
            assert (one.group_std == 0) == (size == 1)
        start += size


def test_who_is_left_unscored_does_not_count_among_the_others() -> None:
    stage = GroupRewards(TimedJudge(skips=lambda rollout: rollout.draw == 1))
    first, second, *others = run_virtually(judged(stage, grouped([4])))
    assert (second.reason, second.detail) == ("ungraded", "no")
    expected = group_advantages([value_of(one.rollout) for one in (first, *others)])
    np.testing.assert_allclose([one.signal.advantages[0] for one in (first, *others)], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        ([Reward(1.0)], "1 rewards came for the 2 answers to prompt p0"),
        ([Reward(1.0), Reward(float("nan"))], "the reward of rollout r1 is no finite number"),
        ([Reward(1.0, {"x": float("inf")}), Reward(2.0)], "the reward of rollout r0 is no finite number"),
        ([Reward(1e300), Reward(-1e300)], "are too large"),
    ],
)
def test_a_bad_answer_of_the_judge_has_a_name(said, error: str) -> None:
    class Bad:
        async def rewards(self, group):
            return said

    with pytest.raises(BadAnswerError, match=error):
        run_virtually(judged(GroupRewards(Bad(), divide_by_std=False), grouped([2])))


def test_a_judge_that_can_judge_nothing_is_given_up() -> None:
    stage = GroupRewards(TimedJudge(skips=lambda rollout: True))
    assert len(run_virtually(judged(stage, grouped([5] * 51)))) == 255
    with pytest.raises(TeacherError, match=r"the last 256 answers could not be judged, this one because: ungraded: no"):
        run_virtually(judged(stage, grouped([1])))


def test_tokens_in_flight_are_limited_and_a_larger_group_goes_alone() -> None:
    for limit, most in ((4 * 5 * 3, 3), (1, 1), (10_000, 8)):  # groups of 4 answers of 5 tokens
        judge = TimedJudge()
        assert len(run_virtually(judged(GroupRewards(judge, inflight_tokens=limit), grouped([4] * 8)))) == 32
        assert judge.most_at_once == most


def test_when_the_money_is_spent_the_groups_under_way_come_to_their_end() -> None:
    async def run(error) -> int:
        judge = TimedJudge(seconds=lambda group: 1.0 + group[0].draw, fail_at=2, error=error)
        with pytest.raises(error, match="told to fail"):
            await judged(GroupRewards(judge), grouped([2] * 6))
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return judge.finished

    assert run_virtually(run(BudgetSpentError)) == 5
    assert run_virtually(run(TeacherError)) == 1


def test_groups_larger_than_every_queue_before_them_come_through() -> None:
    async def run() -> int:
        queue: asyncio.Queue[Rollout | None] = asyncio.Queue(1)
        taken = asyncio.Semaphore(2)  # answers that may wait to be taken
        rollouts = grouped([16] * 5)

        async def feed() -> None:
            for rollout in rollouts:
                await queue.put(rollout)
            await queue.put(None)

        async def source() -> AsyncIterator[Rollout]:
            while (rollout := await queue.get()) is not None:
                yield rollout

        feeding, count = asyncio.create_task(feed()), 0
        async for _ in GroupRewards(TimedJudge(), inflight_tokens=1).score(source(), TEXT):
            async with taken:
                await asyncio.sleep(0.1)
            count += 1
        await feeding
        return count

    assert run_virtually(run()) == 80


# ------------------------------------------------------------ the whole pipeline


def config(*, staleness: int = 1, samples: int = 8, per_update: int = 8, batch_tokens: int = 40, steps: int = 60, **train):
    return simulated_config(per_update=per_update, batch_tokens=batch_tokens, steps=steps, staleness=staleness, samples=samples, **train)


SLOW = Durations(token=0.6, slots=3, trained_token=0.02)


def check(run: Simulation, judge: TimedJudge, samples: int) -> None:
    for state in run.saved:
        assert state.drawn == state.trained + sum(state.rejected.values()) + len(state.pending)
    names = [rollout.rollout_id for group in judge.groups for rollout in group]
    assert len(names) == len(set(names)), "each is judged once"
    for group in judge.groups:
        assert len({rollout.prompt.prompt_id for rollout in group}) == 1
        assert {rollout.group.size for rollout in group} == {len(group)}
        assert len(group) <= samples


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize(("samples", "per_update", "batch_tokens"), [(8, 8, 1), (8, 8, 10_000), (4, 8, 40), (16, 64, 132), (1, 4, 20)])
def test_no_group_waits_for_itself_whatever_the_filters_turn_away(staleness, samples, per_update, batch_tokens) -> None:
    random = np.random.default_rng(0)
    judge = TimedJudge(seconds=lambda group: float(random.pareto(1.0)))
    gate = OpenGate(lambda rollout: len(rollout) % 3 == 0)
    settings = config(staleness=staleness, samples=samples, per_update=per_update, batch_tokens=batch_tokens, checkpoint_every=1)
    run = simulate(settings, SLOW, judge=judge, gate=gate)
    assert run.state.step == 60
    assert max(line.get("staleness_max", 0) for line in run.lines.steps) <= staleness
    check(run, judge, samples)


def test_labelled_sequences_go_between_the_groups() -> None:
    judge = TimedJudge()
    run = simulate(config(samples=3, on_policy_fraction=0.75, checkpoint_every=1), SLOW, judge=judge)
    check(run, judge, 3)
    assert sum(line["labelled_tokens"] for line in run.lines.steps) > 0
    assert {"reward_mean", "reward_half", "zero_spread_share"} <= {name for line in run.lines.steps for name in line}


@pytest.mark.parametrize("staleness", [0, 1])
def test_what_the_judge_leaves_unscored_is_rejected_with_its_reason(staleness: int) -> None:
    judge = TimedJudge(skips=lambda rollout: len(rollout) % 5 == 0)
    run = simulate(config(samples=4, staleness=staleness, checkpoint_every=1), SLOW, judge=judge)
    check(run, judge, 4)
    assert run.saved[-1].rejected["ungraded"] > 0
    assert set(run.saved[-1].rejected) == {"ungraded"}


def test_a_failing_judge_ends_the_run_and_keeps_what_was_done() -> None:
    async def fail() -> Simulation:
        judge = TimedJudge(fail_at=30)
        simulation = Simulation(config(samples=4, steps=500), SLOW, judge=judge)
        with pytest.raises(TeacherError, match="told to fail"):
            await simulation.run()
        assert asyncio.all_tasks() == {asyncio.current_task()}
        check(simulation, judge, 4)
        return simulation

    assert run_virtually(fail()).saved[-1].step > 0


@pytest.mark.parametrize("seconds", [40.0, 100.0, 163.0])
def test_groups_that_a_stop_leaves_under_way_are_drawn_again(seconds: float) -> None:
    async def stop() -> Simulation:
        simulation = Simulation(config(samples=4, per_update=16, steps=500), SLOW, judge=TimedJudge(seconds=lambda group: 5.0))
        asyncio.get_running_loop().call_later(seconds, simulation.stop.set)
        assert await simulation.run() == "stopped"
        return simulation

    saved = run_virtually(stop()).saved[-1]
    assert saved.pending
    kept, judge = RunState.from_json(json.loads(json.dumps(saved.to_json()))), TimedJudge()
    again = simulate(config(samples=4, per_update=16, steps=saved.step + 20), SLOW, state=deepcopy(kept), judge=judge)
    check(again, judge, 4)
    judged_again = [rollout.prompt.prompt_id for group in judge.groups for rollout in group]
    left = [entry["prompt_id"] for entry in saved.pending]
    assert sorted(judged_again[: len(left)]) == sorted(left), "first of all"
