"""Two divergences in one run: each on its own rows, with its own weight and skew at every moment, for any split into micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from bbopd.config import ServeConfig, TeacherConfig, TrainConfig
from bbopd.config_objective import ObjectiveConfig, value_at
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.output_head import OutputHead
from bbopd.trainer import Trainer
from bbopd.types import IGNORE_INDEX, DistillBatch, Offer, SignalSpec, TeacherInfo
from tests.batches import pack, random_sequences, random_teacher
from tests.distill_oracle import compare, cut_rows, draw, logits_of, make_teacher, oracle
from tests.test_objectives import batch_of
from tests.tiny_models import tiny_llama

SIDES = {"labelled": {"name": "skew_forward_kl", "weight": [1.0, 0.5], "skew": [0.1, 0.3]},
         "rollouts": {"name": "skew_reverse_kl", "weight": [1.0, 1.5], "skew": 0.2}}  # fmt: skip


def mixed(**options) -> ObjectiveConfig:
    return ObjectiveConfig.model_validate({"name": "mixed", "temperature": 1.0, "ramp": 0, **SIDES, **options})


def case(kind: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, DistillBatch]:
    hidden, weight, generator = draw(9, 13, seed=seed)
    valid = torch.tensor([True, True, True, False, True, True, True, True, True])
    labels = torch.tensor([3, IGNORE_INDEX, 7, 2, IGNORE_INDEX, IGNORE_INDEX, 12, IGNORE_INDEX, 0])
    return hidden, weight, batch_of(make_teacher(kind, 9, 13, 1.0, generator, valid=valid), labels)


def by_hand(hidden, weight, batch, *, progress: float, ce_weight: float, kd_weight: float):
    """The sum over both sides of what the oracle says of their rows, in float64."""
    z_NV = logits_of(hidden, weight)
    labelled = batch.labels != IGNORE_INDEX
    counts = (float(labelled.sum()), float(batch.teacher.valid.sum()))
    sides = (
        (labelled, "skew_forward_kl", 1.0 - 0.5 * progress, 0.1 + 0.2 * progress),
        (~labelled, "skew_reverse_kl", 1.0 + 0.5 * progress, 0.2),
    )
    total = 0.0
    for rows, name, weight_of_side, skew in sides:
        total = total + oracle(
            z_NV[rows], cut_rows(batch.teacher, rows), batch.labels[rows], divergence=name, skew=skew, ce_weight=ce_weight,
            kd_weight=kd_weight * weight_of_side, token_weight=batch.token_weight[rows], normalizer=counts,
        )[0]  # fmt: skip
    return total


@pytest.mark.parametrize("kind", ["full", "candidates", "topk"])
@pytest.mark.parametrize("progress", [0.0, 0.4, 1.0])
def test_each_side_has_its_own_divergence_weight_and_skew(kind, progress):
    hidden, weight, batch = case(kind)
    objective = make_objective(mixed()).at(progress)
    out = objective.loss(hidden, OutputHead(weight), batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
    compare(out.loss, by_hand(hidden, weight, batch, progress=progress, ce_weight=0.3, kd_weight=0.7), (hidden, weight), 1e-9)
    counts = (6.0 - 1.0, float(batch.teacher.valid.sum()))
    told = 0.3 * (batch.token_weight * out.ce).sum() / counts[0] + 0.7 * (batch.token_weight * out.kd).sum() / counts[1]
    assert out.loss.item() == pytest.approx(float(told), rel=1e-9), "what is told of the tokens adds up to the loss"
    assert float(out.metrics["kd_labelled"] + out.metrics["kd_rollouts"]) == pytest.approx(float(out.kd.sum() / counts[1]), rel=1e-6)


@pytest.mark.parametrize("labels", [torch.arange(9), torch.full((9,), IGNORE_INDEX)], ids=["labelled alone", "rollouts alone"])
def test_a_batch_of_one_side_is_that_side_alone(labels):
    hidden, weight, batch = case("full")
    batch = replace(batch, labels=labels)
    name, skew = ("skew_forward_kl", 0.1) if labels[0] >= 0 else ("skew_reverse_kl", 0.2)
    ours = make_objective(mixed()).loss(hidden, OutputHead(weight), batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
    plain = make_objective(ObjectiveConfig(name=name, temperature=1.0, skew=skew)).loss(
        hidden, OutputHead(weight), batch, ce_weight=0.3, kd_weight=0.7, normalizer=None
    )
    assert ours.loss.item() == plain.loss.item()
    torch.testing.assert_close(ours.kd, plain.kd, rtol=0, atol=0)


def test_without_a_signal_it_is_cross_entropy():
    hidden, weight, batch = case("full")
    batch = replace(batch, teacher=None)
    out = make_objective(mixed()).loss(hidden, OutputHead(weight), batch, ce_weight=1.0, kd_weight=0.7, normalizer=None)
    theirs, _, _ = oracle(logits_of(hidden, weight), None, batch.labels, token_weight=batch.token_weight, ce_weight=1.0)
    compare(out.loss, theirs, (hidden, weight), 1e-9)


@pytest.mark.parametrize("top_k", [0, 20])
def test_a_step_is_the_same_for_any_split_and_changes_with_the_run(top_k):
    sequences = random_sequences(6, seed=3)
    teacher = random_teacher(sequences, seed=4)
    config = mixed(alpha=0.3)
    found = {}
    for steps_done in (0, 9):
        for split in ([6], [1] * 6, [2, 4]):
            model = tiny_llama()
            trainer = Trainer(model, make_objective(config), train=TrainConfig(warmup=0), objective_config=config, planned_steps=10)
            trainer.steps_done = steps_done
            parts, start = [], 0
            for count in split:
                parts.append(pack(sequences[start : start + count], teacher[start : start + count], top_k))
                start += count
            totals = trainer.accumulate(parts)
            grads = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            whole = found.setdefault(steps_done, (float(totals.totals["loss"]), {k: float(v) for k, v in totals.more.items()}, grads))
            assert float(totals.totals["loss"]) == pytest.approx(whole[0], rel=2e-5)
            assert {k: float(v) for k, v in totals.more.items() if k != "tail_share"} == pytest.approx(
                {k: v for k, v in whole[1].items() if k != "tail_share"}, rel=2e-5
            )
            assert (grads - whole[2]).norm() <= 2e-5 * whole[2].norm()
    assert found[9][1]["kd_rollouts"] == pytest.approx(1.5 * found[0][1]["kd_rollouts"], rel=1e-4), "its weight has risen by half"
    assert found[9][1]["kd_labelled"] < 0.55 * found[0][1]["kd_labelled"], "and the other's has fallen, its skew risen"


def test_values_change_along_a_straight_line():
    assert [value_at((1.0, 3.0), progress) for progress in (0.0, 0.25, 1.0, 2.0)] == [1.0, 1.5, 3.0, 3.0]
    assert value_at(0.7, 0.4) == 0.7


def test_its_defaults_are_those_of_distillm_2():
    config = ObjectiveConfig(name="mixed")
    assert (config.labelled.name, config.rollouts.name) == ("skew_forward_kl", "skew_reverse_kl")
    assert (config.labelled.weight, config.labelled.skew, config.rollouts.weight, config.rollouts.skew) == (1.0, 0.1, 1.0, 0.1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "jsd", "labelled": {"name": "jsd"}}, "belong to objective.name=mixed"),
        ({"name": "mixed", "skew": 0.3}, "objective.labelled.skew and objective.rollouts.skew"),
        ({"name": "mixed", "rollouts": {"name": "jsd", "skew": [0.1, 1.5]}}, "less than 1"),
        ({"name": "mixed", "labelled": {"name": "jsd", "weight": -1}}, "greater than or equal to 0"),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(ValidationError, match=message):
        ObjectiveConfig.model_validate(options)


def test_a_teacher_must_serve_both_sides():
    served = {"serve": ServeConfig(model="tiny")}
    objective = make_objective(mixed())
    assert objective.needs == ("full", "candidates", "topk")
    assert signal_for(objective, TeacherConfig(signal="candidates", topk=8, **served)) == SignalSpec("candidates", 1.0)
    other = make_objective(mixed(labelled={"name": "forward_kl"}, rollouts={"name": "reverse_kl"}))
    assert other.needs == ("full",)
    with pytest.raises(ConfigError, match=r"mixed cannot use teacher\.signal topk: set teacher\.signal to full"):
        signal_for(other, TeacherConfig(topk=8, **served))
    with pytest.raises(ConfigError, match=r"mixed cannot use teacher\.signal candidates"):
        signal_for(other, TeacherConfig(signal="candidates", **served))
    info = TeacherInfo("tiny", 9, (Offer("topk", 8),))
    with pytest.raises(TeacherError, match="asks for the full signal"):
        check_offer(other, info, SignalSpec("full"))
