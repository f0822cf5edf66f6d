"""Objectives: which teachers they take, which they refuse, and what their loss is."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

from bbopd.config import ObjectiveConfig, ServeConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError, TrainingError
from bbopd.objectives import OBJECTIVES, check_offer, make_objective, signal_for
from bbopd.output_head import OutputHead
from bbopd.types import DIVERGENCES, DistillBatch, FullTeacher, Offer, OpTeacher, SignalSpec, TeacherInfo
from tests.distill_oracle import bucket, compare, draw, logits_of, make_teacher, oracle


def batch_of(teacher: OpTeacher | None, labels: torch.Tensor) -> DistillBatch:
    N = labels.shape[0]
    rows = torch.arange(N)
    return DistillBatch(
        input_ids=rows,
        position_ids=rows,
        boundaries=torch.tensor([0, N], dtype=torch.int32),
        target_rows=rows,
        target_ids=labels.clamp(min=0),
        labels=labels,
        token_weight=torch.linspace(0.5, 1.5, N),
        teacher=teacher,
        response_tokens=N,
        rollout_tokens=0,
    )


def teacher_of(*offers: Offer) -> TeacherInfo:
    return TeacherInfo(model="tiny", vocab_size=9, offers=offers)


def served(**options: object) -> TeacherConfig:
    return TeacherConfig(serve=ServeConfig(model="tiny"), **options)


def test_the_table_holds_every_name_a_config_can_give() -> None:
    assert set(OBJECTIVES) == {*DIVERGENCES, "aligned", "gad", "mixed", "policy_gradient", "sft", "seqkd", "verbal"}
    for name in OBJECTIVES:
        assert make_objective(ObjectiveConfig(name=name)).name == name


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("t2_scaling", [True, False])
def test_loss_is_the_op_with_the_configured_settings(name: str, t2_scaling: bool) -> None:
    hidden, weight, generator = draw(4, 9)
    labels = torch.tensor([1, -100, 8, -100])
    config = ObjectiveConfig(name=name, temperature=2.0, t2_scaling=t2_scaling, beta=0.3, skew=0.2)
    batch = batch_of(make_teacher("full", 4, 9, 2.0, generator), labels)
    ours = make_objective(config).loss(
        hidden, OutputHead(weight, torch.ones(9), 1.5, 6.0), batch, ce_weight=0.2, kd_weight=0.9, normalizer=(3, 5)
    )
    theirs, _, _ = oracle(
        logits_of(hidden, weight, torch.ones(9), 1.5, 6.0), batch.teacher, labels, temperature=2.0, divergence=name, beta=0.3, skew=0.2,
        t2_scaling=t2_scaling, token_weight=batch.token_weight, normalizer=(3, 5), ce_weight=0.2, kd_weight=0.9,
    )  # fmt: skip
    compare(ours.loss, theirs, (hidden, weight), 1e-7)


def test_sft_looks_at_labels_alone() -> None:
    hidden, weight, generator = draw(4, 9)
    labels = torch.tensor([1, -100, 8, 3])
    batch = batch_of(make_teacher("full", 4, 9, 1.0, generator), labels)
    out = make_objective(ObjectiveConfig(name="sft")).loss(hidden, OutputHead(weight), batch, ce_weight=1.0, kd_weight=1.0, normalizer=None)
    theirs, _, _ = oracle(logits_of(hidden, weight), None, labels, token_weight=batch.token_weight, ce_weight=1.0)
    compare(out.loss, theirs, (hidden, weight), 1e-10)
    assert signal_for(make_objective(ObjectiveConfig(name="sft")), served()) is None


def test_a_batch_without_a_teacher_is_plain_cross_entropy() -> None:
    hidden, weight, _ = draw(3, 9)
    batch = batch_of(None, torch.tensor([1, 2, 3]))
    out = make_objective(ObjectiveConfig()).loss(hidden, OutputHead(weight), batch, ce_weight=1.0, kd_weight=0.0, normalizer=None)
    theirs, _, _ = oracle(logits_of(hidden, weight), None, batch.labels, token_weight=batch.token_weight, ce_weight=1.0)
    compare(out.loss, theirs, (hidden, weight), 1e-10)


def test_signal_asks_for_raw_logits_or_for_ids_at_the_temperature() -> None:
    objective = make_objective(ObjectiveConfig(temperature=2.0))
    assert signal_for(objective, served()) == SignalSpec(level="full", temperature=1.0)
    assert signal_for(objective, served(topk=32)) == SignalSpec(level="topk", temperature=2.0, top_k=32)


def test_reverse_kl_refuses_the_teachers_own_ids() -> None:
    with pytest.raises(
        ConfigError,
        match=r"reverse_kl cannot use teacher.signal topk: set teacher.signal to full or candidates, or objective.name to forward_kl",
    ):
        signal_for(make_objective(ObjectiveConfig(name="reverse_kl")), served(topk=32))


@pytest.mark.parametrize(
    ("name", "offer", "want", "message"),
    [
        (
            "forward_kl",
            Offer("sampled"),
            SignalSpec("full"),
            "asks for the full signal, but teacher tiny offers sampled.*fits: sampled for policy_gradient",
        ),
        (
            "forward_kl",
            Offer("topk", 64),
            SignalSpec("full"),
            "teacher tiny offers topk.*fits: topk for forward_kl, jsd, skew_forward_kl, skew_reve",
        ),
        ("forward_kl", Offer("text"), SignalSpec("topk", 1.0, 8), "what fits: text for seqkd"),
        ("forward_kl", Offer("topk", 64), SignalSpec("topk", 2.0, 8), "temperature 2.0, but teacher tiny applies 1.0 to 1.0"),
        ("jsd", Offer("topk", 20), SignalSpec("topk", 1.0, 64), "top 64 ids a token, but teacher tiny gives at most 20"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(name: str, offer: Offer, want: SignalSpec, message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        check_offer(make_objective(ObjectiveConfig(name=name)), teacher_of(offer), want)


def test_a_teacher_that_fits_is_taken() -> None:
    objective = make_objective(ObjectiveConfig(temperature=2.0))
    offers = (Offer("full"), Offer("topk", 64, 0.5, 4.0))
    for config in (served(), served(topk=64)):
        check_offer(objective, teacher_of(*offers), signal_for(objective, config))


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("kind", ["topk", "candidates"])
def test_the_share_of_the_tail_is_told(name: str, kind: str) -> None:
    """Against float64: the bucket's own term of each divergence, all of which are of the form that is never negative."""
    hidden, weight, generator = draw(7, 12)
    valid = torch.tensor([True, True, False, True, True, True, True])
    batch = batch_of(make_teacher(kind, 7, 12, 1.0, generator, K=5, valid=valid), torch.full((7,), -100))
    config = ObjectiveConfig(name=name, temperature=1.0, beta=0.3, skew=0.2)
    out = make_objective(config).loss(hidden, OutputHead(weight), batch, ce_weight=0.0, kd_weight=1.0, normalizer=None)
    log_q_NV = logits_of(hidden, weight).detach().log_softmax(1)
    tails, whole = 0.0, 0.0
    for row in torch.arange(7)[valid]:
        ids = batch.teacher.ids[row]
        live = ids >= 0
        p = torch.cat([batch.teacher.logprobs[row][live], batch.teacher.log_tail[row : row + 1]]).log_softmax(0).exp()
        q = bucket(log_q_NV[row], ids).exp()
        terms = {
            "forward_kl": p * (p / q).log() + q - p,
            "reverse_kl": q * (q / p).log() + p - q,
            "jsd": 0.3 * p * (p / (0.3 * p + 0.7 * q)).log() + 0.7 * q * (q / (0.3 * p + 0.7 * q)).log(),
            "skew_forward_kl": p * (p / (0.2 * p + 0.8 * q)).log() + 0.8 * (q - p),
            "skew_reverse_kl": q * (q / (0.2 * q + 0.8 * p)).log() + 0.8 * (p - q),
        }[name]
        assert (terms > -1e-12).all()
        tails, whole = tails + terms[-1], whole + terms.sum()
    assert float(out.metrics["tail_share"]) == pytest.approx(float(tails / whole), rel=1e-4)


def test_whole_distributions_have_no_tail() -> None:
    hidden, weight, generator = draw(4, 9)
    batch = batch_of(make_teacher("full", 4, 9, 1.0, generator), torch.full((4,), -100))
    out = make_objective(ObjectiveConfig(name="jsd")).loss(hidden, OutputHead(weight), batch, ce_weight=0.0, kd_weight=1.0, normalizer=None)
    assert "tail_share" not in out.metrics
    all_ids = batch_of(make_teacher("candidates", 4, 9, 1.0, generator, K=9), torch.full((4,), -100))
    out = make_objective(ObjectiveConfig(name="jsd", temperature=1.0)).loss(
        hidden, OutputHead(weight), all_ids, ce_weight=0.0, kd_weight=1.0, normalizer=None
    )
    assert 0.0 <= float(out.metrics["tail_share"]) <= 1.0


@pytest.mark.parametrize("name", ["forward_kl", "sft"])
def test_a_diverged_student_is_a_training_error(name: str) -> None:
    hidden, weight, generator = draw(2, 9)
    batch = batch_of(FullTeacher(torch.randn(2, 9, generator=generator)), torch.tensor([1, 2]))
    objective = make_objective(ObjectiveConfig(name=name))
    with pytest.raises(TrainingError, match="hidden states are not finite"):
        objective.loss(hidden * float("nan"), OutputHead(weight), batch, ce_weight=1.0, kd_weight=1.0, normalizer=None)
    with pytest.raises(TrainingError, match="output weights are not finite"):
        objective.loss(hidden, OutputHead(weight / 0.0), batch, ce_weight=1.0, kd_weight=1.0, normalizer=None)


def test_the_example_of_one_step_by_hand_learns() -> None:
    example = runpy.run_path(str(Path(__file__).parents[1] / "examples" / "distill_step.py"))
    losses = example["main"](steps=12)
    assert losses[-1] < 0.8 * losses[0]
