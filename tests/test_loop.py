"""The loop over a tiny real student, a fake engine and a fake teacher: budgets, order, stopping, failing, going on."""

import asyncio
import json
from dataclasses import replace
from itertools import pairwise

import pytest

from bbopd.config import FiltersConfig, TeacherConfig
from bbopd.data.filters import RolloutFilter
from bbopd.errors import RolloutsRejectedError, TeacherError, TrainingError
from bbopd.pipeline.gate import RolloutGate
from bbopd.pipeline.state import RunState
from bbopd.rollouts.fake import FakeEngine
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.loop_rig import VOCAB, Rig, poison, run_config
from tests.waiting import PATIENCE


async def test_budgets_phases_and_books(tmp_path):
    rig = Rig(run_config(tmp_path / "run"))
    assert await rig.run() == "finished"
    lines = rig.folder.read_lines("metrics.jsonl")
    cold = [line for line in lines if line["phase"] == "cold_start"]
    main = [line for line in lines if line["phase"] == "on_policy"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["rollout_tokens"] for line in cold) == 0
    assert sum(line["labelled_tokens"] for line in cold) == rig.loop.state.cold_start_tokens >= 100
    assert sum(line["rollout_tokens"] for line in main) == rig.loop.state.on_policy_tokens == main[-1]["on_policy_tokens"] >= 200
    # the last cycle is the one that spent the budget: without it, it was not spent
    last_cycle = [line for line in main if line["cycle"] == main[-1]["cycle"]]
    assert rig.loop.state.on_policy_tokens - sum(line["rollout_tokens"] for line in last_cycle) < 200
    assert rig.evaluated == [("start", 0), ("cold_start", cold[-1]["step"]), ("end", lines[-1]["step"])]
    assert rig.loop.state.scored_tokens == rig.loop.state.trained_tokens == sum(line["tokens"] for line in lines)
    assert rig.engine.version == lines[-1]["step"]


class SleepingEngine(FakeEngine):
    """Writes nothing while it sleeps, and is woken by a push."""

    is_asleep = False
    naps = 0

    async def generate(self, prompts, sampling):
        assert not self.is_asleep
        async for rollout in super().generate(prompts, sampling):
            yield rollout

    async def load_weights(self, weights, version) -> None:
        await super().load_weights(weights, version)
        self.is_asleep = False

    async def sleep(self) -> None:
        assert not self.is_asleep
        self.is_asleep, self.naps = True, self.naps + 1


async def test_an_engine_sleeps_while_the_trainer_trains(tmp_path):
    engine = SleepingEngine(VOCAB, eos_token_id=2)
    rig = Rig(run_config(tmp_path / "run", rollouts={"max_staleness": 0}), engine=engine)
    asleep: list[bool] = []
    rig.watcher.advance = lambda metrics, budget: asleep.append(engine.is_asleep)
    assert await rig.run() == "finished"
    lines = rig.folder.read_lines("metrics.jsonl")
    assert asleep == [True] * len(lines)
    cycles = {line["cycle"] for line in lines if line["phase"] == "on_policy"}
    assert engine.naps == 1 + len(cycles)  # the cold start, which writes nothing, is one
    events = rig.loop._timeline.to_json()["traceEvents"]
    assert sum(event.get("args", {}).get("span") == "to sleep" or event["name"] == "to sleep" for event in events) == engine.naps


async def test_a_stop_saves_and_the_same_command_reaches_the_same_losses(tmp_path):
    whole = Rig(run_config(tmp_path / "whole"))
    await whole.run()

    config = run_config(tmp_path / "parts")
    first = Rig(config, at_step=(3, lambda rig: rig.stop.set()))
    assert await first.run() == "stopped"
    second = Rig(config)
    assert second.resumed_from >= 3
    assert await second.run() == "finished"
    assert second.losses() == whole.losses()
    assert ("start", 0) not in second.evaluated


async def test_what_a_lost_checkpoint_did_not_hold_is_done_again(tmp_path):
    whole = Rig(run_config(tmp_path / "whole"))
    await whole.run()
    config = run_config(tmp_path / "killed")

    def die(rig):
        raise KeyboardInterrupt  # the process ends here: nothing more is saved

    killed = Rig(config, at_step=(6, die))
    with pytest.raises(KeyboardInterrupt):
        await killed.run()
    again = Rig(config)
    assert again.resumed_from < 6
    assert await again.run() == "finished"
    assert again.losses() == whole.losses()


class _LongWriter(FakeEngine):
    """Never ends a rollout, so that only a stop request can end the cycle."""

    async def generate(self, prompts, sampling):
        async for _ in prompts:
            await asyncio.sleep(3600)
        yield  # pragma: no cover


async def test_a_stop_while_sampling_drops_the_cycle_at_once(tmp_path):
    config = run_config(tmp_path / "run", train={"cold_start_tokens": 0})
    rig = Rig(config, engine=_LongWriter(VOCAB, eos_token_id=2))
    asyncio.get_running_loop().call_later(0.3, rig.stop.set)
    assert await asyncio.wait_for(rig.run(), timeout=PATIENCE) == "stopped"
    assert rig.loop.state == RunState(seconds=rig.loop.state.seconds)
    assert rig.losses() == []


async def test_a_dying_teacher_is_an_error_with_the_work_kept(tmp_path):
    config = run_config(tmp_path / "run", train={"checkpoint_every": 100})
    rig = Rig(config, teacher=FakeTeacher(FakeBackend(VOCAB, die_after=20)))
    with pytest.raises(TeacherError):
        await rig.run()
    kept = latest_checkpoint(rig.folder.checkpoints)
    assert kept is not None
    assert json.loads((kept / "state.json").read_text())["state"]["step"] == rig.losses()[-1][0] > 0
    again = Rig(config)
    assert await again.run() == "finished"


async def test_rollouts_that_are_all_rejected_end_the_run(tmp_path):
    config = run_config(tmp_path / "run", train={"cold_start_tokens": 0})
    rig = Rig(config)
    gate = RolloutGate(RolloutFilter(FiltersConfig(min_tokens=1000), (2,)), rig.log, {})
    rig.loop._parts = replace(rig.parts, gate=gate)
    with pytest.raises(TrainingError, match=r"no rollout passed the filters in 8 cycles.*too_short 32"):
        await rig.run()
    assert len(rig.folder.read_lines("rejected.jsonl")) == 32


async def test_too_few_accepted_rollouts_end_the_run_with_its_progress_kept(tmp_path):
    config = run_config(tmp_path / "run", train={"checkpoint_every": 100})
    rig = Rig(config)
    filters = FiltersConfig(min_tokens=1000, min_kept=0.5, kept_window=6)
    gate = RolloutGate(RolloutFilter(filters, (2,)), rig.log, {})
    rig.loop._parts = replace(rig.parts, gate=gate)
    with pytest.raises(RolloutsRejectedError, match=r"let 0 of the last 6 rollouts through .*too_short 6.*rejected\.jsonl"):
        await rig.run()
    lines = rig.folder.read_lines("rejected.jsonl")
    assert len(lines) == 6
    assert all(line["figure"] < line["limit"] == 1000 for line in lines)
    kept = latest_checkpoint(rig.folder.checkpoints)
    assert kept is not None
    assert json.loads((kept / "state.json").read_text())["state"]["step"] == rig.losses()[-1][0] > 0
    assert await Rig(config).run() == "finished"  # with filters that let them pass


async def test_evaluations_every_n_steps(tmp_path):
    config = run_config(tmp_path / "run")
    config = config.model_copy(update={"eval": config.eval.model_copy(update={"every": 4})})
    rig = Rig(config)
    await rig.run()
    steps = [step for stage, step in rig.evaluated if stage == "step"]
    assert steps
    assert len(steps) <= rig.loop.state.step // 4
    assert all(later // 4 > earlier // 4 for earlier, later in pairwise(steps))


async def test_the_demo_recipe_lowers_the_divergence(tmp_path):
    config = run_config(tmp_path / "run", train={"on_policy_tokens": 1500, "lr": 5e-3}, objective={"alpha": 0.0, "ramp": 0})
    rig = Rig(config)
    await rig.run()
    kd = [line["kd"] for line in rig.folder.read_lines("metrics.jsonl")]
    assert sum(kd[-4:]) < 0.8 * sum(kd[:4])


async def test_a_nan_update_is_not_applied_and_the_work_before_it_is_kept(tmp_path):
    rig = Rig(run_config(tmp_path / "run", train={"checkpoint_every": 100}), at_step=(5, poison))
    with pytest.raises(TrainingError, match=r"update 6 .*not applied"):
        await rig.run()
    kept = latest_checkpoint(rig.folder.checkpoints)
    assert kept is not None
    assert json.loads((kept / "state.json").read_text())["state"]["step"] == 5
    again = Rig(rig.config)
    assert again.resumed_from == 5
    assert await again.run() == "finished"


async def test_the_step_limit_ends_a_run_wherever_it_stands(tmp_path):
    for name, limit in (("cold", 1), ("main", 7)):
        rig = Rig(run_config(tmp_path / name, train={"total_steps": limit, "warmup": 0}, objective={"temperature": 1.0, "ramp": 0}))
        assert await rig.run() == "finished"
        assert rig.loop.state.step == limit


async def test_a_large_tail_is_warned_of_once(tmp_path):
    config = run_config(tmp_path / "run", train={"on_policy_tokens": 60}).model_copy(
        update={"teacher": TeacherConfig(target="grpc://localhost:1", topk=2)}
    )
    rig = Rig(config)
    await rig.run()
    assert len([note for note in rig.watcher.notes if "in the tail" in note and "teacher.topk" in note]) == 1
