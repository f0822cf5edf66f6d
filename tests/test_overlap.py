"""Cycles that overlap: as fast as their slowest stage, no rollout older than allowed, nothing lost, and a clean end for every failure.

Most of it on a virtual clock (`simulated`); the last part with a real student and a thread.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest

from bbopd.errors import EngineError, TeacherError, TrainingError
from bbopd.pipeline.books import Books
from bbopd.pipeline.ledger import Ledger
from bbopd.pipeline.state import RunState
from bbopd.planning.virtual_clock import run_virtually
from bbopd.rollouts.fake import FakeEngine
from bbopd.trainer.checkpoint import latest_checkpoint
from bbopd.types import Prompt, Rollout
from tests.loop_rig import VOCAB, Rig, run_config
from tests.simulated import Durations, OpenGate, Simulation, Stream, TimedTeacher, heavy_tail, simulate, simulated_config

BALANCED = Durations(token=0.6, slots=64, trained_token=0.0184, teacher=heavy_tail)


def config(steps: int = 60, staleness: int = 1, **keywords):
    return simulated_config(per_update=64, batch_tokens=132, steps=steps, staleness=staleness, **keywords)  # 8 steps a cycle


def check_books(state: RunState) -> None:
    assert state.drawn == state.trained + state.rolled_back + sum(state.rejected.values()) + len(state.pending)


# ------------------------------------------------------------ speed


@pytest.mark.parametrize(
    "durations",
    [
        BALANCED,
        Durations(token=0.6, slots=64, trained_token=0.01, teacher=heavy_tail),
        Durations(token=0.3, slots=64, trained_token=0.02, teacher=heavy_tail),
    ],
    ids=["balanced", "sampling is slowest", "training is slowest"],
)
def test_wall_clock_is_that_of_the_slowest_stage(durations: Durations) -> None:
    run = simulate(config(80), durations)
    at_once = {"token": 0.0, "trained_token": 0.0, "teacher": lambda random: 0.0}
    alone = [simulate(config(80), replace(durations, **{**at_once, name: getattr(durations, name)})).seconds for name in at_once]
    assert max(alone) < 1.01 * run.seconds
    assert run.seconds < 1.10 * max(alone)
    assert run.seconds == pytest.approx(sum(run.timeline.seconds().values()))
    assert max(line["staleness_max"] for line in run.lines.steps) == 1
    check_books(run.saved[-1])


def test_without_staleness_stages_add_up() -> None:
    run = simulate(config(48, staleness=0), BALANCED)
    training = sum(map(run.trainer.seconds_of, run.trainer.tokens))
    seconds = run.timeline.seconds()
    assert seconds["training"] == pytest.approx(training)
    assert run.seconds == pytest.approx(seconds["sampling"] + seconds["scoring"] + training)
    assert seconds["sampling"] == pytest.approx(run.timeline.busy_seconds()["sampling"])


def test_batches_hold_about_their_budget_of_tokens() -> None:
    run = simulate(config(80), BALANCED)
    assert all(132 - 16 <= tokens <= 132 + 16 for tokens in run.trainer.tokens[:-1])  # half of the longest answer to either side


# ------------------------------------------------------------ staleness, stragglers


def test_the_ledger_keeps_a_cycle_open_for_what_must_not_grow_older() -> None:
    ledger = Ledger(per_cycle=2, max_staleness=1)
    ledger.push(0)
    ledger.begin(0, range(2), range(0))
    assert ledger.may_begin(1)
    ledger.begin(1, range(2, 4), range(0))
    assert not ledger.may_begin(2)
    ledger.finish(0)
    ledger.finish(2)  # overtakes 1, which may still be trained in cycle 1
    assert ledger.cycle == 1
    assert ledger.is_straggler(1)
    assert not ledger.is_stale(Rollout("", Prompt("", (1,)), (1,), weights_version=0))
    ledger.push(5)
    ledger.begin(2, range(4, 6), range(0))
    ledger.finish(4)
    ledger.finish(5)
    assert ledger.cycle == 1, "1 and 3 would be two cycles old in the next one"
    ledger.finish(1)
    ledger.finish(3)
    assert ledger.cycle == 3
    assert ledger.is_stale(Rollout("", Prompt("", (1,)), (1,), weights_version=5))
    assert ledger.is_stale(Rollout("", Prompt("", (1,)), (1,), weights_version=99)), "a version that was never pushed"


def sometimes_long(random, longest: int) -> int:
    return longest if random.random() < 0.05 else int(random.integers(1, 5))


def test_stragglers_hold_up_no_batch_and_are_all_trained() -> None:
    slow_sometimes = Durations(token=0.05, slots=64, trained_token=0.001, teacher=lambda random: 30.0 if random.random() < 0.02 else 0.01)
    run = simulate(config(200, longest=32), slow_sometimes, lengths=sometimes_long)
    assert sum(line["stragglers"] for line in run.lines.steps) > 0
    assert max(line["staleness_max"] for line in run.lines.steps) == 1
    assert run.state.rejected == {}
    check_books(run.saved[-1])
    assert run.state.drawn - run.state.trained <= 2 * 64


def test_what_an_engine_wrote_with_older_weights_than_it_was_given_is_stale() -> None:
    run = simulate(config(60), BALANCED, lags=lambda draw: 2 * (draw % 4 == 0))
    assert run.state.rejected["stale"] > 0
    assert max(line["staleness_max"] for line in run.lines.steps) <= 1
    check_books(run.saved[-1])
    with pytest.raises(EngineError, match="too old to be trained on"):
        simulate(config(500), BALANCED, lags=lambda draw: 2)


# ------------------------------------------------------------ filters, budgets, evaluation


def test_rejected_labelled_and_trained_sequences_add_up_at_every_save() -> None:
    gate = OpenGate(lambda rollout: len(rollout) % 3 == 0)
    run = simulate(config(60, on_policy_fraction=0.75, checkpoint_every=1), BALANCED, gate=gate)
    assert len(run.saved) == 60
    for state in run.saved:
        check_books(state)
    labelled = sum(line["labelled_tokens"] for line in run.lines.steps)
    rollout_tokens = sum(line["rollout_tokens"] for line in run.lines.steps)
    assert labelled / 16 == pytest.approx(run.state.trained * 0.25 / (0.75 * 0.66 + 0.25), rel=0.1), "labelled ones are evenly mixed in"
    assert rollout_tokens == run.state.on_policy_tokens
    assert [state.rejected["turned_away"] for state in run.saved] == sorted(state.rejected["turned_away"] for state in run.saved)


def test_rollouts_that_are_all_rejected_end_the_run() -> None:
    with pytest.raises(TrainingError, match="no rollout passed the filters in 8 cycles"):
        simulate(config(60, on_policy_fraction=0.75), BALANCED, gate=OpenGate(lambda rollout: True))


def test_an_evaluation_sees_the_weights_of_its_step_and_an_empty_pipeline() -> None:
    settings = config(60)
    settings = settings.model_copy(update={"eval": settings.eval.model_copy(update={"every": 20})})
    run = simulate(settings, BALANCED)
    evaluated = [(step, version) for stage, step, version in run.evaluations if stage == "step"]
    assert len(evaluated) >= 2
    assert all(step == version for step, version in evaluated)
    assert all(step - step % 20 == 20 * (number + 1) for number, (step, _) in enumerate(evaluated))


def test_a_token_budget_is_spent_and_little_more_is_drawn() -> None:
    settings = config(100_000, on_policy_tokens=5_000)
    run = simulate(settings, BALANCED)
    assert 5_000 <= run.state.on_policy_tokens < 5_000 + 2 * 132
    assert run.state.drawn - run.state.trained <= 2 * 64
    check_books(run.saved[-1])


# ------------------------------------------------------------ stopping, failing, going on


async def _run_and_stop(simulation: Simulation, seconds: float) -> str:
    asyncio.get_running_loop().call_later(seconds, simulation.stop.set)
    result = await simulation.run()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left behind"
    return result


def test_what_a_stop_leaves_under_way_is_drawn_again_first() -> None:
    async def stop() -> Simulation:
        simulation = Simulation(config(500, on_policy_fraction=0.75), BALANCED)
        assert await _run_and_stop(simulation, 200.0) == "stopped"
        return simulation

    first = run_virtually(stop())
    saved = first.saved[-1]
    check_books(saved)
    assert len(saved.pending) > 64
    kept = RunState.from_json(json.loads(json.dumps(saved.to_json())))
    again = simulate(config(saved.step + 40, on_policy_fraction=0.75), BALANCED, state=deepcopy(kept))
    check_books(again.saved[-1])
    left = {(entry["prompt_id"], entry["is_labelled"]) for entry in saved.pending}
    assert left.isdisjoint((entry["prompt_id"], entry["is_labelled"]) for entry in again.saved[-1].pending)
    # all that was drawn in both runs, each once: positions say how far drawing went
    assert sum(again.saved[-1].position.values()) == again.saved[-1].drawn


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ({"engine_fails_at": 150}, EngineError),
        ({"teacher_fails_at": 150}, TeacherError),
        ({"trainer_fails_at": 12}, TrainingError),
    ],
    ids=["sampling", "scoring", "training"],
)
def test_a_failing_stage_ends_the_others_and_keeps_what_was_done(fault: dict[str, int], error: type[Exception]) -> None:
    simulation: list[Simulation] = []

    async def fail() -> None:
        simulation.append(Simulation(config(500, checkpoint_every=1000), BALANCED, **fault))
        with pytest.raises(error, match="was told to fail"):
            await simulation[0].run()
        assert asyncio.all_tasks() == {asyncio.current_task()}, "nothing is left behind"

    run_virtually(fail())
    state = simulation[0].saved[-1]
    assert state.step == len(simulation[0].trainer.tokens) > 0
    check_books(state)
    assert (state.rejected.get("bad_update", 0) > 0) == (error is TrainingError)


def test_an_engine_that_loses_a_prompt_is_an_error() -> None:
    class Forgetful(FakeEngine):
        async def generate(self, prompts, sampling):
            async for rollout in super().generate(prompts, sampling):
                if rollout.draw != 3:
                    yield rollout

    async def run() -> None:
        simulation = Simulation(config(20), BALANCED)
        simulation.engine = Forgetful(VOCAB, eos_token_id=2)
        with pytest.raises(EngineError, match="asked for 64 answers and ended after 63"):
            await simulation.run()

    run_virtually(run())


def test_pending_prompts_come_back_from_a_checkpoint_as_they_were() -> None:
    class Chats(Stream):
        def next_prompts(self, count: int) -> list[Prompt]:
            return [replace(prompt, text="a", messages=(("user", "b"), ("user", "c"))) for prompt in super().next_prompts(count)]

    state = RunState()
    books = Books(state, Chats(), OpenGate(), samples_per_prompt=1)
    draw = books.draw(3, 2)
    books.book(draw)
    books.train(draw.numbers[:1])
    books.close()
    kept = RunState.from_json(json.loads(json.dumps(state.to_json())))
    again = Books(kept, Chats(), OpenGate(), samples_per_prompt=1).draw(2, 2)
    assert again.rollouts == draw.rollouts[1:]
    assert again.labelled == draw.labelled
    assert again.again == 4


def test_a_teacher_that_ends_early_is_an_error() -> None:
    class Brief(TimedTeacher):
        async def score(self, rollouts, want):
            async with aclosing(super().score(rollouts, want)) as answers:
                yield await anext(answers)

    async def run() -> None:
        simulation = Simulation(config(20), BALANCED)
        simulation.teacher = Brief(BALANCED)
        with pytest.raises(TeacherError, match="ended its answers"):
            await simulation.run()

    run_virtually(run())


# ------------------------------------------------------------ a real student, and a thread


def real_config(folder: Path):
    return run_config(folder, train={"on_policy_tokens": 1200, "checkpoint_every": 3})


async def test_a_real_student_is_trained_beside_a_real_engine(tmp_path) -> None:
    with ThreadPoolExecutor(1) as executor:
        rig = Rig(real_config(tmp_path / "run"), engine=FakeEngine(VOCAB, eos_token_id=2, delay=0.002), executor=executor)
        checked: list[tuple[int, int]] = []

        def compare(rollouts, version: int) -> dict[str, float]:
            versions = {rollout.weights_version for rollout in rollouts if not rollout.is_labelled}
            if versions:  # a cold start has none
                checked.append((version, *versions, rig.parts.trainer.steps_done))
            return {"engine_difference_mean": 0.0}

        rig.loop._parts = replace(rig.parts, agreement=compare)
        assert await rig.run() == "finished"
    assert len(checked) > 2
    assert all(len(set(versions)) == 1 for versions in checked), "the trainer's weights are those that the engine wrote with"
    lines = rig.folder.read_lines("metrics.jsonl")
    main = [line for line in lines if line["phase"] == "on_policy"]
    assert sum(line["rollout_tokens"] for line in main) == rig.loop.state.on_policy_tokens >= 1200
    assert all(line["staleness_max"] <= 1 for line in main)
    assert rig.evaluated == [("start", 0), ("cold_start", lines[len(lines) - len(main) - 1]["step"]), ("end", lines[-1]["step"])]
    saved = json.loads((latest_checkpoint(rig.folder.checkpoints) / "state.json").read_text())["state"]
    check_books(RunState.from_json(saved))
    assert rig.engine.version == lines[-1]["step"], "the last evaluation is of the last weights"
