"""Updates that must not be applied: skipped, rolled back or the end of a run, with every sequence and token in the books."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bbopd.config import TrainConfig
from bbopd.errors import DivergedError, TrainingError
from bbopd.pipeline.bad_updates import BadUpdates, Fault, spike_limit
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.state import RunState
from bbopd.rollouts.fake import FakeEngine
from bbopd.trainer.checkpoint import latest_checkpoint
from bbopd.trainer.step import Gradients, StepTokens
from tests.loop_rig import VOCAB, Rig, poison, run_config
from tests.test_checkpoint import batch_of, make_trainer
from tests.test_overlap import check_books

# ------------------------------------------------------------ what is bad


def gradients(loss: float, grad_norm: float = 1.0) -> Gradients:
    return Gradients(StepTokens.of([]), {}, {}, 0.5, 0.5, loss=loss, grad_norm=grad_norm)


def remembering(values: Any, **train: Any) -> BadUpdates:
    state = RunState(step=100, recent=[[float(loss), float(norm)] for loss, norm in values])
    return BadUpdates(TrainConfig(on_spike="skip", **train), state)


def test_a_spike_is_far_above_the_median_by_the_median_deviation() -> None:
    random = np.random.default_rng(0)
    values = random.normal(3.0, 1.5, 101)
    middle = np.median(values)
    expected = middle + 4.0 * 1.4826 * np.median(np.abs(values - middle))
    assert spike_limit(values.tolist(), 4.0) == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(3.0 + 4.0 * 1.5, rel=0.2), "as standard deviations of a normal distribution"
    spoilt = [*values[:90].tolist(), *[1e6] * 11]
    assert spike_limit(spoilt, 4.0) < 2 * expected, "spikes in the window hardly move it"
    assert spike_limit([2.0] * 20, 10.0) == 4.0, "a loss that does not vary"
    assert spike_limit((-values).tolist(), 4.0) == pytest.approx(-middle + expected - middle, rel=1e-12), "losses may be negative"


def test_losses_and_gradient_norms_are_judged_each_by_its_own_past() -> None:
    random = np.random.default_rng(1)
    past = np.stack([random.normal(2.0, 0.1, 64), random.normal(10.0, 1.0, 64)], 1)
    judges = remembering(past)
    assert judges.judge("on_policy", gradients(2.3, 13.0)) is None
    assert judges.judge("on_policy", gradients(9.9, 13.0)).kind == "loss_spike"
    assert judges.judge("on_policy", gradients(2.3, 99.0)).kind == "gradient_spike"
    assert judges.judge("on_policy", gradients(-9.9, 0.0)) is None, "lower is no harm"
    for spoilt in (gradients(math.nan), gradients(2.0, math.inf)):
        assert judges.judge("on_policy", spoilt).kind == "nonfinite"
    assert remembering(past[:31]).judge("on_policy", gradients(9.9)) is None, "half of the window is not there yet"
    assert remembering(past, spike_threshold=200.0).judge("on_policy", gradients(9.9)) is None


def test_a_new_phase_has_losses_of_its_own() -> None:
    judges = remembering([(2.0, 1.0)] * 64)
    judges._state.cold_start_steps = 100
    assert judges.judge("cold_start", gradients(9.9)).kind == "loss_spike"
    assert judges.judge("on_policy", gradients(9.9)) is None


def test_a_discriminator_that_goes_wrong_stops_a_run_by_default_and_nothing_after_the_checkpoint_is_saved() -> None:
    state = RunState()
    with pytest.raises(DivergedError, match=r"not finite, so .*\(train.on_nonfinite=stop\): lower objective.gad.discriminator_lr"):
        BadUpdates(TrainConfig(on_spike="skip"), state).answer(Fault("discriminator", "its scores are not finite"), 7)
    assert (state.bad_updates, state.skipped_tokens) == ({"discriminator": 1}, 7)


def test_a_dropped_update_leaves_no_trace() -> None:
    trainer, untouched = make_trainer(), make_trainer()
    trainer.accumulate([batch_of(7)])
    trainer.drop()
    assert trainer.train_step([batch_of(0)]).loss == untouched.train_step([batch_of(0)]).loss
    for (name, ours), (_, theirs) in zip(trainer.weights(), untouched.weights(), strict=True):
        assert torch.equal(ours, theirs), name


# ------------------------------------------------------------ what the run does about it


def spoil_at(steps: set[int], spoil: Callable[[Rig], None] = poison) -> Callable[[Rig], None]:
    """After each of ``steps``, once; what `Rig` does at one step."""

    def act(rig: Rig) -> None:
        advance = rig.watcher.advance

        def watch(metrics: Any, budget: Any) -> None:
            if metrics["step"] in steps:
                steps.discard(metrics["step"])
                spoil(rig)
            advance(metrics, budget)

        rig.watcher.advance = watch

    return act


def explode(rig: Rig) -> None:
    """The next gradient will be far too large."""
    parameter = next(rig.parts.trainer.model.parameters())

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        handle.remove()
        return gradient * 1e4

    handle = parameter.register_hook(spoil)


def spoilt_rig(folder: Path, steps: set[int], spoil: Callable[[Rig], None] = poison, executor: Any = None, **train: Any) -> Rig:
    config = run_config(folder, train={"on_policy_tokens": 220, "checkpoint_every": 3, **train}, rollouts={"max_staleness": bool(executor)})
    rig = Rig(config, engine=FakeEngine(VOCAB, eos_token_id=2) if executor else None, executor=executor, min_tokens=4)
    spoil_at(steps, spoil)(rig)
    return rig


def saved_state(folder: RunFolder) -> RunState:
    found = latest_checkpoint(folder.checkpoints)
    return RunState.from_json(json.loads((found / "state.json").read_text())["state"])


def check_lines(folder: RunFolder, state: RunState, least: int = 220) -> None:
    """Every update once, and every token in its place, of a run that has ended in ``state``."""
    lines = folder.read_lines("metrics.jsonl")
    check_books(saved_state(folder))
    assert [line["step"] for line in lines] == list(range(1, state.step + 1))
    assert sum(line["tokens"] for line in lines) == state.trained_tokens
    assert sum(line["rollout_tokens"] for line in lines) == state.on_policy_tokens >= least
    undone = folder.read_lines("rolled_back.jsonl")
    assert sum(line["tokens"] for line in undone) == state.rolled_back_tokens
    assert len(undone) == state.rolled_back_updates
    rejected = [line for line in folder.read_lines("rejected.jsonl") if line["reason"] == "bad_update"]
    assert len(rejected) == state.rejected["bad_update"] > 0
    assert sum(len(line["token_ids"]) for line in rejected) == state.skipped_tokens


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "overlapping"])
async def test_a_bad_update_is_skipped_and_counted(tmp_path, overlaps: bool) -> None:
    with ThreadPoolExecutor(1) if overlaps else nullcontext() as executor:
        rig = spoilt_rig(tmp_path / "run", {5, 8}, on_nonfinite="skip", executor=executor)
        assert await rig.run() == "finished"
    check_lines(rig.folder, rig.loop.state)
    state = rig.loop.state
    assert state.bad_updates == {"nonfinite": 2}
    assert state.rolled_back_updates == state.rolled_back == state.bad_in_a_row == 0
    last = rig.folder.read_lines("metrics.jsonl")[-1]
    assert (last["bad_updates"], last["skipped_tokens"]) == (2, state.skipped_tokens)
    notes = [note for note in rig.watcher.notes if "was skipped" in note]
    assert len(notes) == 2
    assert "the gradient norm of update 6 is nan" in notes[0]


@pytest.mark.parametrize("overlaps", [False, True], ids=["in turn", "overlapping"])
async def test_a_bad_update_sends_the_run_back_to_its_checkpoint_and_on_with_other_prompts(tmp_path, overlaps: bool) -> None:
    with ThreadPoolExecutor(1) if overlaps else nullcontext() as executor:
        rig = spoilt_rig(tmp_path / "run", {8}, on_nonfinite="roll_back", executor=executor, checkpoint_every=100)
        went_back: list[Any] = []
        load = rig.checkpoints.roll_back

        def look() -> RunState:
            before = rig.loop.state.step
            saved = load()
            stored = load_file(latest_checkpoint(rig.folder.checkpoints) / "model/model.safetensors")
            now = rig.parts.trainer.model.state_dict()
            went_back.append((before, saved, all(torch.equal(now[name], weight) for name, weight in stored.items())))
            return saved

        object.__setattr__(rig.parts, "roll_back", look)
        assert await rig.run() == "finished"
    check_lines(rig.folder, rig.loop.state)
    [(before, saved, is_as_stored)] = went_back
    assert (before, is_as_stored) == (8, True)
    assert saved.step == saved.cold_start_steps < 8
    state = rig.loop.state
    assert state.rolled_back_updates == 8 - saved.step
    assert state.rolled_back > 0
    assert state.bad_updates == {"nonfinite": 1}
    assert state.sequences()["rolled back"] == state.rolled_back
    again = {line["step"]: line for line in rig.folder.read_lines("metrics.jsonl")}
    for undone in rig.folder.read_lines("rolled_back.jsonl"):
        assert again[undone["step"]]["loss"] != undone["loss"], "other prompts, so another loss"
        assert again[undone["step"]]["cycle"] > undone["cycle"]
    assert any(f"back from step 8 to the checkpoint of step {saved.step}" in note for note in rig.watcher.notes)


async def test_before_its_first_checkpoint_a_run_goes_back_to_its_beginning(tmp_path) -> None:
    rig = spoilt_rig(tmp_path / "run", {2}, on_nonfinite="roll_back", checkpoint_every=100)
    assert await rig.run() == "finished"
    check_lines(rig.folder, rig.loop.state)
    assert rig.loop.state.rolled_back_updates == 2


async def test_a_gradient_explosion_is_a_spike(tmp_path) -> None:
    rig = spoilt_rig(tmp_path / "run", {9}, explode, on_spike="skip", spike_window=8)
    assert await rig.run() == "finished"
    check_lines(rig.folder, rig.loop.state)
    assert rig.loop.state.bad_updates == {"gradient_spike": 1}
    norms = [line["grad_norm"] for line in rig.folder.read_lines("metrics.jsonl")]
    assert max(norms) < 100 * np.median(norms)


@pytest.mark.parametrize(("answer", "error"), [("skip", TrainingError), ("roll_back", DivergedError)])
async def test_too_many_in_a_row_stop_the_run(tmp_path, answer: str, error: type[TrainingError]) -> None:
    always = {"on_nonfinite": answer, "bad_updates_in_a_row": 2}
    rig = spoilt_rig(tmp_path / "run", set(), **always)
    trainer = rig.parts.trainer
    measured = trainer._measured
    trainer._measured = lambda found, started: measured(found, started) if trainer.steps_done < 7 else gradients(math.nan)
    with pytest.raises(TrainingError, match=r"3rd bad update in a row.*train\.bad_updates_in_a_row allows 2.*lower train\.lr") as caught:
        await rig.run()
    assert type(caught.value) is error
    state = saved_state(rig.folder)
    check_books(state)
    if answer == "skip":
        assert (state.step, state.bad_updates) == (7, {"nonfinite": 3}), "what was trained is kept"
    else:
        assert state.step < 7, "the checkpoint that led there stands"
        assert state.bad_updates == {}, "as it was"
    again = Rig(rig.config, min_tokens=4)
    assert await again.run() == "finished"


async def test_by_default_a_spike_is_trained_on_and_by_policy_it_stops_the_run(tmp_path) -> None:
    assert TrainConfig().on_spike == "none"
    rig = spoilt_rig(tmp_path / "run", {9}, explode, on_spike="stop", spike_window=8)
    with pytest.raises(TrainingError, match=r"gradient norm of update 10 is .* above .*\(train\.on_spike=stop\).*rejected\.jsonl"):
        await rig.run()
    assert saved_state(rig.folder).step == 9
