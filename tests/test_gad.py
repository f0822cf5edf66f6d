"""The student's side of adversarial distillation: its gradient in float64, and the game on ten classes, whose end is known."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bbopd.config import ObjectiveConfig, RunConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.objectives.bradley_terry import PairScores, bradley_terry_gradient
from bbopd.objectives.group_advantages import group_advantages
from bbopd.objectives.policy_gradient import surrogate
from bbopd.output_head import OutputHead
from bbopd.types import IGNORE_INDEX, DistillBatch, Offer, SampledTeacher, SignalSpec, TeacherInfo

TEMPERATURE = 0.8
GAD = ObjectiveConfig(name="gad", temperature=TEMPERATURE, ce_weight=1.0, kd_weight=1.0, ramp=0, t2_scaling=False)


def random_batch(random: torch.Generator, weight: Tensor, hidden: Tensor, labelled: int) -> DistillBatch:
    """The first ``labelled`` rows are the teacher's words; the others were sampled from a student up to half a nat away."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tokens = torch.randint(0, vocabulary, (rows,), generator=random)
    now = (hidden @ weight.T / TEMPERATURE).log_softmax(-1).gather(1, tokens[:, None])[:, 0].detach()

    def near(spread: float) -> Tensor:
        return (now + spread * (2 * torch.rand(rows, generator=random, dtype=now.dtype) - 1)).clamp(max=-1e-3)

    is_sampled = torch.arange(rows) >= labelled
    teacher = SampledTeacher(
        token_ids=tokens,
        behavior_logprobs=near(0.5),
        advantages=torch.randn(rows, generator=random, dtype=now.dtype),
        temperature=TEMPERATURE,
        valid=is_sampled,
    )
    return DistillBatch(
        input_ids=tokens,
        position_ids=torch.arange(rows),
        boundaries=torch.tensor([0, rows], dtype=torch.int32),
        target_rows=torch.arange(rows),
        target_ids=tokens,
        labels=torch.where(is_sampled, IGNORE_INDEX, tokens),
        token_weight=torch.ones(rows),
        teacher=teacher,
        response_tokens=rows,
        rollout_tokens=rows - labelled,
        reference_logprobs=near(1.0),
    )


def dense_loss(hidden: Tensor, weight: Tensor, batch: DistillBatch, kl_weight: float) -> Tensor:
    """The formulas as they are written: PPO's minimum and k3, by autograd over dense logits."""
    teacher, logits = batch.teacher, hidden @ weight.T
    sampled = teacher.valid
    log_q = (logits / TEMPERATURE).log_softmax(-1).gather(1, teacher.token_ids[:, None])[:, 0][sampled]
    ratio, advantage = (log_q - teacher.behavior_logprobs[sampled]).exp(), teacher.advantages[sampled]
    gain = torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.2) * advantage)
    apart = batch.reference_logprobs[sampled] - log_q
    policy = (-gain + kl_weight * (apart.exp() - apart - 1)).mean()
    labels = batch.labels[~sampled]
    return policy + (torch.nn.functional.cross_entropy(logits[~sampled], labels) if len(labels) else 0.0)


@pytest.mark.parametrize("labelled", [0, 7])
@pytest.mark.parametrize("kl_weight", [0.001, 3.0])
def test_loss_and_gradient_against_autograd_in_float64(labelled, kl_weight):
    random = torch.Generator().manual_seed(labelled + 1)
    weight = torch.randn(53, 8, generator=random, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(40, 8, generator=random, dtype=torch.float64, requires_grad=True)
    batch = random_batch(random, weight, hidden, labelled)
    config = GAD.model_copy(update={"gad": GAD.gad.model_copy(update={"kl_weight": kl_weight})})
    expected = dense_loss(hidden, weight, batch, kl_weight)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    found = make_objective(config).loss(hidden, OutputHead(weight), batch, ce_weight=1.0, kd_weight=1.0, normalizer=None)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-9)
    for mine, its in zip(torch.autograd.grad(found.loss, (hidden, weight)), wanted, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-8, atol=1e-11)
    assert 0 < found.metrics["clipped_high"] + found.metrics["clipped_low"] < 1


# ---------------------------------------------------------------- ten classes

CLASSES = torch.arange(10, dtype=torch.float64)


def bell(mean: float | Tensor, width: float | Tensor) -> Tensor:
    """Logprobs of a normal distribution on the ten classes."""
    return (-0.5 * ((CLASSES - mean) / width) ** 2).log_softmax(0)


TEACHER = 0.6 * bell(2.0, 0.7).exp() + 0.4 * bell(7.0, 0.7).exp()


def categorical(parameters: Tensor) -> Tensor:
    return parameters.log_softmax(0)


def one_bell(parameters: Tensor) -> Tensor:
    return bell(parameters[0], parameters[1].exp())


EVERY_CLASS = torch.eye(10, dtype=torch.float64)


def play(
    student, start: Tensor, *, seed: int, steps: int, features: Tensor = EVERY_CLASS, is_frozen_after: int | None = None
) -> tuple[Tensor, Tensor, list[float]]:
    """The game: the student's distribution at the end and its mean over the second half, and the margins.

    The discriminator's score of a class is linear in its ``features`` [10, F]. 32 prompts a cycle with 8 answers each and one of the
    teacher's; both sides by Adam.
    """
    random = torch.Generator().manual_seed(seed)
    parameters, weights = start.clone().requires_grad_(), torch.zeros(features.shape[1], dtype=torch.float64)
    players = torch.optim.Adam([parameters], 0.01 if student is categorical else 0.02), torch.optim.Adam([weights], 0.05)
    reference = student(start)
    mean, margins = torch.zeros(10, dtype=torch.float64), []
    for step in range(steps):
        log_q, scores_of = student(parameters), features @ weights
        answers = torch.multinomial(log_q.detach().exp(), 32 * 8, replacement=True, generator=random)
        taught = torch.multinomial(TEACHER, 32, replacement=True, generator=random)
        scores = PairScores(scores_of[taught], scores_of[answers], torch.arange(32).repeat_interleave(8))
        margins.append(float(scores.margins.mean()))
        advantages = torch.cat([torch.from_numpy(group_advantages(group.tolist())) for group in scores.student.split(8)])
        gain = surrogate(log_q.detach()[answers], log_q.detach()[answers], advantages, (0.2, 0.2), reference[answers], 0.001).gain
        (parameters.grad,) = torch.autograd.grad(-(gain * log_q[answers]).mean(), parameters)
        by_teacher, by_student = bradley_terry_gradient(scores)
        weights.grad = by_teacher @ features[taught] + by_student @ features[answers]
        players[0].step()
        if is_frozen_after is None or step < is_frozen_after:
            players[1].step()
        if step >= steps // 2:
            mean += student(parameters.detach()).exp() / (steps - steps // 2)
    return student(parameters.detach()).exp(), mean, margins


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


@pytest.mark.parametrize("seed", range(2))
def test_a_student_that_can_write_all_the_teacher_does_ends_with_its_distribution(seed):
    """q = p is the game's only equilibrium: elsewhere some class has a higher score than others."""
    end, mean, margins = play(categorical, torch.zeros(10, dtype=torch.float64), seed=seed, steps=800)
    assert 0.5 * float((mean - TEACHER).abs().sum()) < 0.02
    assert kl(TEACHER, end) < 0.03
    assert max(margins[:100]) > 0.5
    assert abs(sum(margins[-200:]) / 200) < 0.1, "in the end no score tells the one from the other"


@pytest.mark.parametrize("seed", range(2))
def test_a_student_of_one_mode_seeks_where_cross_entropy_covers(seed):
    """A student near one mode of the teacher stays with it; cross-entropy spreads it over both, and over what is between them."""
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    seqkd = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([seqkd], 0.02)
    for _ in range(800):
        (seqkd.grad,) = torch.autograd.grad(-(TEACHER * one_bell(seqkd)).sum(), seqkd)
        optimizer.step()
    covering, (_, seeking, _) = one_bell(seqkd.detach()).exp(), play(one_bell, start, seed=seed, steps=400)
    between = slice(4, 6)
    assert float(TEACHER[between].sum()) < 0.02
    assert float(covering[between].sum()) > 0.2
    assert float(seeking[between].sum()) < 0.06
    assert float(seeking[:5].sum()) > 0.95, "all of it at the first mode"
    assert kl(seeking, TEACHER) < 0.85 * kl(covering, TEACHER)
    assert kl(TEACHER, covering) < 0.5 * kl(TEACHER, seeking)


def test_a_discriminator_that_learns_no_more_is_gamed():
    """Frozen, it goes on paying for its best class, so that the student writes nothing else; learning, it takes that back."""
    start = torch.zeros(10, dtype=torch.float64)
    (frozen, _, paid), (learning, _, _) = (play(categorical, start, seed=5, steps=600, is_frozen_after=limit) for limit in (100, None))
    assert float(frozen.max()) > 0.9
    assert float(learning.max()) < 0.5
    assert kl(frozen, TEACHER) > 10 * kl(learning, TEACHER)
    assert paid[-1] < -0.2, "it finds the student's answers better than the teacher's"


def test_one_that_goes_by_length_is_gamed_by_length_once_it_is_frozen():
    """The classes are lengths, the student starts short. What has learned "longer is the teacher's" and then stands still pays for the
    longest there is; what goes on learning turns round where the student has the teacher's mean length."""
    start = bell(0.0, 3.0)
    (frozen, _, _), (_, learning, _) = (
        play(categorical, start, seed=6, steps=700, features=CLASSES[:, None] / 10, is_frozen_after=limit) for limit in (60, None)
    )
    wanted = float(TEACHER @ CLASSES)
    assert float(start.exp() @ CLASSES) < wanted - 1
    assert float(frozen @ CLASSES) > 8.5, "the longest there is is 9"
    assert float(learning @ CLASSES) == pytest.approx(wanted, abs=0.7)


# ---------------------------------------------------------------- configuration

RUN = {
    "student": {"model": "x"},
    "teacher": {"target": "grpc://localhost:1", "signal": "text"},
    "objective": {"name": "gad"},
    "train": {"cold_start_tokens": 1000},
}


def run_with(**sections) -> RunConfig:
    return RunConfig.model_validate({**RUN, **{name: {**RUN.get(name, {}), **values} for name, values in sections.items()}})


def test_what_a_run_leaves_open_is_as_in_the_paper():
    config = run_with()
    rollouts, gad = config.rollouts, config.objective.gad
    assert (rollouts.samples_per_prompt, rollouts.temperature, rollouts.on_policy_fraction, rollouts.max_staleness) == (8, 0.8, 1.0, 0)
    assert (config.train.lr, gad.discriminator_lr, gad.kl_weight) == (1e-6, 1e-6, 0.001)
    assert (config.objective.temperature, config.objective.weights, config.objective.clip_range) == (0.8, (1.0, 1.0), (0.2, 0.2))
    own = run_with(rollouts={"temperature": 1.0, "samples_per_prompt": 4}, train={"cold_start_tokens": 5, "lr": 1e-5})
    assert (own.objective.temperature, own.rollouts.samples_per_prompt, own.train.lr) == (1.0, 4, 1e-5)
    assert RunConfig.model_validate(own.model_dump()) == own
    plain = RunConfig.model_validate({"student": {"model": "x"}, "teacher": {"target": "grpc://localhost:1"}})
    assert (plain.rollouts.samples_per_prompt, plain.train.lr) == (2, 2e-5)


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"rollouts": {"per_update": 12}}, r"samples_per_prompt 8.*a divisor of the 12 rollouts"),
        ({"rollouts": {"samples_per_prompt": 1}}, "must be 2 or more"),
        ({"rollouts": {"top_p": 0.9}}, r"top_p 0.9.*set top_p=1"),
        ({"objective": {"temperature": 1.0}}, r"objective.temperature 1.0 with rollouts.temperature 0.8"),
        ({"rollouts": {"max_staleness": 1}}, r"max_staleness=0"),
        ({"train": {"cold_start_tokens": 0}}, "begins with a warm-up"),
        ({"objective": {"ramp": 5}}, r"objective.ramp=0"),
        ({"teacher": {"signal": "full"}}, "seqkd, gad and verbal learn from what the teacher writes"),
    ],
)
def test_what_cannot_be_is_refused(sections, said):
    with pytest.raises(ValidationError, match=said):
        run_with(**sections)


def test_a_teacher_that_does_not_write_is_refused():
    objective = make_objective(GAD)
    assert signal_for(objective, TeacherConfig(target="grpc://localhost:1", signal="text")) == SignalSpec("text", temperature=TEMPERATURE)
    with pytest.raises(ConfigError, match=r"gad cannot use teacher.signal full: set teacher.signal to text"):
        signal_for(objective, TeacherConfig(target="grpc://localhost:1"))
    with pytest.raises(TeacherError, match=r"gad asks for the text signal.*offers full"):
        check_offer(objective, TeacherInfo("t", 9, (Offer("full"),)), SignalSpec("text"))
