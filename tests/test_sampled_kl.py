"""Reverse KL by policy gradient, against the exact gradient: every answer that a small vocabulary allows, with its probability.

Shape suffixes: ``N`` rows, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig
from bbopd.data.assemble import assemble
from bbopd.objectives import make_objective
from bbopd.objectives.sampled_kl import reward_to_go, sampled_tokens
from bbopd.output_head import OutputHead
from bbopd.types import (
    CandidateTeacher,
    DistillBatch,
    FullTeacher,
    OpTeacher,
    Prompt,
    Rollout,
    SampledTeacher,
    ScoredRollout,
    SignalSpec,
    TeacherSignal,
    TopKTeacher,
)
from tests.distill_oracle import bucket
from tests.simulated import Durations, heavy_tail, simulate, simulated_config

V, D, PADDING, END, LONGEST = 4, 6, 2, 0, 3
LEVELS = ("sampled", "full", "candidates", "topk")


def prefixes() -> list[tuple[int, ...]]:
    """Whatever can stand before a token: answers end with END, or when they are as long as they may be."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(LONGEST - 1):
        found += [(*prefix, token) for prefix in found for token in range(V) if token != END and (*prefix, token) not in found]
    return found


def answers() -> list[tuple[int, ...]]:
    every = [(*prefix, token) for prefix in prefixes() for token in range(V)]
    return [answer for answer in every if answer[-1] == END or len(answer) == LONGEST]


@dataclass
class World:
    """A student with a hidden state for every prefix, and a teacher with logits for every prefix."""

    hidden: Tensor  # [prefixes, D]
    weight: Tensor  # [V and padding, D]
    logits: Tensor  # [prefixes, V], the teacher's
    temperature: float

    @classmethod
    def draw(cls, seed: int, temperature: float = 1.0, apart: float = 1.0) -> World:
        print("seed", seed)  # shown where a test fails
        generator = torch.Generator().manual_seed(seed)
        P = len(prefixes())

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        hidden, weight = noise(P, D), noise(V + PADDING, D) / D**0.5
        return cls(
            hidden.requires_grad_(), weight.requires_grad_(), hidden.detach() @ weight.detach()[:V].T + apart * noise(P, V), temperature
        )

    def log_q(self) -> Tensor:
        return (self.hidden @ self.weight[:V].T / self.temperature).log_softmax(1)

    def log_p(self) -> Tensor:
        return (self.logits / self.temperature).log_softmax(1)

    def of_answer(self, table_PV: Tensor, answer: tuple[int, ...]) -> Tensor:
        places = [prefixes().index(answer[:i]) for i in range(len(answer))]
        return table_PV[places, list(answer)]

    def probability(self, answer: tuple[int, ...], log_q_PV: Tensor) -> Tensor:
        return self.of_answer(log_q_PV, answer).sum().exp()

    def batch(self, some: list[tuple[int, ...]], level: str, old_PV: Tensor, weights: list[float]) -> tuple[Tensor, DistillBatch]:
        """The hidden rows of ``some`` answers, and the batch that they make; each answer's rows count ``weights`` times."""
        places = torch.tensor([prefixes().index(answer[:i]) for answer in some for i in range(len(answer))])
        ids = torch.tensor([token for answer in some for token in answer])
        lengths = [len(answer) for answer in some]
        told = self.log_p()[places].gather(1, ids[:, None])[:, 0]
        behavior = old_PV[places].gather(1, ids[:, None])[:, 0]
        starts = [0, *accumulate(length + 1 for length in lengths)]  # a prompt of one token before each
        rows = torch.cat([torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=False)])
        batch = DistillBatch(
            input_ids=torch.zeros(starts[-1], dtype=torch.int64),
            position_ids=torch.zeros(starts[-1], dtype=torch.int64),
            boundaries=torch.tensor(starts, dtype=torch.int32),
            target_rows=rows,
            target_ids=ids,
            labels=torch.full((len(ids),), -100),
            token_weight=torch.tensor(weights, dtype=torch.float64).repeat_interleave(torch.tensor(lengths)),
            teacher=self.teacher(level, places, ids, told, behavior),
            response_tokens=len(ids),
            rollout_tokens=len(ids),
            behavior_logprobs=behavior,
            sampled_logprobs=told,
        )
        return self.hidden[places], batch

    def teacher(self, level: str, places: Tensor, ids: Tensor, told: Tensor, behavior: Tensor) -> OpTeacher:
        if level == "sampled":
            return SampledTeacher(token_ids=ids, behavior_logprobs=behavior, logprobs=told, temperature=self.temperature)
        if level == "full":
            padding = torch.zeros(len(places), PADDING, dtype=torch.float64)
            return FullTeacher(logits=torch.cat([self.logits[places], padding], dim=1))
        best = self.log_p() if level == "topk" else self.log_q().detach()
        chosen = best[places].topk(2).indices
        logprobs = self.log_p()[places].gather(1, chosen)
        tails = torch.stack([bucket(self.log_p()[place], some)[-1] for place, some in zip(places, chosen, strict=True)])
        return (TopKTeacher if level == "topk" else CandidateTeacher)(chosen, logprobs, tails, self.temperature)

    @property
    def head(self) -> OutputHead:
        return OutputHead(self.weight, vocab_size=V)

    def gradient(self, some: list[tuple[int, ...]], weights: list[float], config: ObjectiveConfig, level: str, old_PV: Tensor) -> Tensor:
        """Of the objective's loss on ``some`` answers, weighted and added up: hidden and weight in one vector."""
        hidden_ND, batch = self.batch(some, level, old_PV, weights)
        loss = make_objective(config).loss(hidden_ND, self.head, batch, ce_weight=0.0, kd_weight=1.0, normalizer=(1.0, 1.0))
        return flat(torch.autograd.grad(loss.loss, (self.hidden, self.weight)))


def flat(gradients: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients])


def config(**options: object) -> ObjectiveConfig:
    return ObjectiveConfig(name="policy_gradient", t2_scaling=False, **{"clip": None, "temperature": 1.0, **options})


def settings(level: str) -> list[dict[str, str]]:
    return [{"baseline": "none"}] if level == "sampled" else [{"baseline": "none"}, {"baseline": "kl"}]


# ---------------------------------------------------------------- the estimator


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("level", LEVELS)
def test_at_discount_1_it_is_the_gradient_of_the_answers_kl_on_average(level: str, temperature: float) -> None:
    world = World.draw(torch.seed() % 2**31, temperature)
    log_q_PV = world.log_q()
    exact = sum(
        world.probability(answer, log_q_PV) * (world.of_answer(log_q_PV, answer) - world.of_answer(world.log_p(), answer)).sum()
        for answer in answers()
    )
    expected = flat(torch.autograd.grad(exact, (world.hidden, world.weight)))
    old = world.log_q().detach()
    weights = [float(world.probability(answer, old)) for answer in answers()]
    assert sum(weights) == pytest.approx(1.0)
    for setting in settings(level):
        ours = world.gradient(answers(), weights, config(discount=1.0, temperature=temperature, **setting), level, old)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("level", LEVELS)
def test_at_discount_0_it_is_the_gradient_of_each_tokens_kl_on_average(level: str, temperature: float) -> None:
    """The KL at every prefix, weighted by how often the student gets there, which is not credited."""
    world = World.draw(torch.seed() % 2**31, temperature)
    old, log_q_PV = world.log_q().detach(), world.log_q()
    reached = [world.probability(prefix, old) if prefix else 1.0 for prefix in prefixes()]
    kl_P = (log_q_PV.exp() * (log_q_PV - world.log_p())).sum(1)
    exact = sum(share * kl for share, kl in zip(reached, kl_P, strict=True))
    expected = flat(torch.autograd.grad(exact, (world.hidden, world.weight)))
    weights = [float(world.probability(answer, old)) for answer in answers()]
    for setting in settings(level):
        ours = world.gradient(answers(), weights, config(discount=0.0, temperature=temperature, **setting), level, old)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("level", ["full", "candidates", "topk"])
def test_the_baseline_moves_no_average_of_a_student_that_has_moved_on(level: str) -> None:
    """Every answer as often as the old student writes it; importance ratios make up for the difference."""
    world, before = World.draw(torch.seed() % 2**31), World.draw(torch.seed() % 2**31)
    old = before.log_q().detach()
    first_tokens = [(token,) for token in range(V)]
    weights = [float(old[0, token].exp()) for token in range(V)]
    plain, less = (world.gradient(first_tokens, weights, config(baseline=baseline), level, old) for baseline in ("none", "kl"))
    torch.testing.assert_close(plain, less, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("discount", [0.0, 1.0])
@pytest.mark.parametrize("level", ["full", "candidates", "topk"])
def test_the_baseline_lowers_the_variance(level: str, discount: float) -> None:
    """The exact variance of one answer's gradient by the student's states, summed over students some nats from their teachers.

    Of a single student it may rise: a constant is the best baseline only where no token has a larger gradient than the others.
    """
    spread = {"none": 0.0, "kl": 0.0}
    lengths = torch.tensor([len(answer) for answer in answers()])
    places = torch.tensor([prefixes().index(answer[:i]) for answer in answers() for i in range(len(answer))])
    for seed in range(20):
        world = World.draw(seed, apart=3.0)
        old = world.log_q().detach()
        share_N = torch.stack([world.probability(answer, old) for answer in answers()]).detach().repeat_interleave(lengths)
        for baseline in spread:
            hidden, batch = world.batch(answers(), level, old, [1.0] * len(lengths))
            objective = make_objective(config(discount=discount, baseline=baseline))
            loss = objective.loss(hidden, world.head, batch, ce_weight=0.0, kd_weight=1.0, normalizer=(1.0, 1.0)).loss
            (gradient_ND,) = torch.autograd.grad(loss, hidden)  # no answer goes through a state twice: a row is a part of its gradient
            mean = torch.zeros_like(world.hidden).index_add(0, places, share_N[:, None] * gradient_ND.detach())
            spread[baseline] += float((share_N * gradient_ND.detach().square().sum(1)).sum() - mean.square().sum())
    assert spread["kl"] < 0.9 * spread["none"], spread


# ---------------------------------------------------------------- its parts


@pytest.mark.parametrize("discount", [0.0, 0.3, 0.99, 1.0])
def test_credit_for_what_follows_ends_with_the_sequence(discount: float) -> None:
    generator = torch.Generator().manual_seed(int(100 * discount))
    lengths = [1, 7, 1, 64, 33, 2]
    own = torch.randn(sum(lengths), generator=generator)
    expected: list[float] = []
    for part in own.split(lengths):
        for t in range(len(part)):
            expected.append(sum(discount ** (s - t) * float(part[s]) for s in range(t, len(part))))
    sequence_N = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    torch.testing.assert_close(reward_to_go(own, sequence_N, discount), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert reward_to_go(own[:0], sequence_N[:0], discount).shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_every_level_tells_the_same_of_the_sampled_tokens(temperature: float) -> None:
    world = World.draw(7, temperature)
    old = world.log_q().detach()
    for level in LEVELS:
        _, batch = world.batch(answers()[3:9], level, old, [1.0] * 6)
        found = sampled_tokens(batch, temperature, V)
        assert found is not None
        torch.testing.assert_close(found.logprobs, batch.sampled_logprobs)
        torch.testing.assert_close(found.behavior_logprobs, batch.behavior_logprobs)
        assert bool(found.valid.all())


def test_rows_that_nobody_sampled_carry_no_signal() -> None:
    world = World.draw(8)
    hidden, batch = world.batch([(1, 2, 3), (2, 0)], "full", world.log_q().detach(), [1.0, 1.0])
    labelled = torch.tensor([True, True, True, False, False])
    half = replace(
        batch, behavior_logprobs=batch.behavior_logprobs.masked_fill(labelled, torch.nan),
        labels=torch.where(labelled, batch.target_ids, -100),
    )  # fmt: skip
    out = make_objective(config(discount=1.0, baseline="kl")).loss(hidden, world.head, half, ce_weight=0.5, kd_weight=1.0, normalizer=None)
    alone = world.batch([(2, 0)], "full", world.log_q().detach(), [1.0])
    kd = make_objective(config(discount=1.0, baseline="kl")).loss(
        alone[0], world.head, alone[1], ce_weight=0.0, kd_weight=1.0, normalizer=None
    )
    torch.testing.assert_close(out.kd, torch.cat([torch.zeros(3, dtype=torch.float64), kd.kd]))
    ce = -(hidden @ world.weight[:V].T).log_softmax(1)[range(3), batch.target_ids[:3]].mean()
    assert out.loss.item() == pytest.approx((0.5 * ce + kd.loss).item())
    for name in ("sampled_kl", "baseline_kl", "importance_ratio"):
        assert out.metrics[name].item() == pytest.approx(kd.metrics[name].item()), name
    own = world.log_q()[[0, 2], [2, 0]] - world.log_p()[[0, 2], [2, 0]]
    assert out.metrics["sampled_kl"].item() == pytest.approx(own.mean().item())


def test_a_batch_without_rollouts_is_cross_entropy() -> None:
    world = World.draw(9)
    hidden, batch = world.batch([(1, 2, 3)], "full", world.log_q().detach(), [1.0])
    batch = replace(batch, teacher=None, behavior_logprobs=None, sampled_logprobs=None, labels=batch.target_ids)
    out = make_objective(config()).loss(hidden, world.head, batch, ce_weight=1.0, kd_weight=1.0, normalizer=None)
    ce = -(hidden @ world.weight[:V].T).log_softmax(1)[range(3), batch.target_ids].mean()
    assert out.loss.item() == pytest.approx(ce.item())


# ---------------------------------------------------------------- in a run


@pytest.mark.parametrize("staleness", [0, 1])
def test_labelled_sequences_are_trained_on_without_asking_the_teacher(staleness: int) -> None:
    config = simulated_config(per_update=16, batch_tokens=66, steps=24, staleness=staleness, on_policy_fraction=0.5)
    run = simulate(config, Durations(token=0.3, teacher=heavy_tail), want=SignalSpec("sampled", rollouts_only=True))
    state = run.saved[-1]
    assert state.labelled_tokens > 0
    assert state.on_policy_tokens > 0
    still_waiting = (1 + staleness) * config.rollouts_per_cycle * 32
    assert still_waiting < state.labelled_tokens
    assert state.on_policy_tokens <= run.state.scored_tokens <= state.on_policy_tokens + still_waiting
    everything = simulate(config, Durations(token=0.3, teacher=heavy_tail))
    assert everything.state.scored_tokens >= everything.state.on_policy_tokens + everything.state.labelled_tokens
    assert state.drawn == state.trained + sum(state.rejected.values()) + len(state.pending)


def test_a_batch_knows_what_its_tokens_were_sampled_from() -> None:
    prompt = Prompt("p", (1, 2))
    drawn = Rollout("a", prompt, (3, 4), logprobs=np.array([-0.5, -1.5], np.float32))
    labelled = Rollout("b", prompt, (5,), origin="reference")
    signal = TeacherSignal("topk", 1.0, ids=np.array([[3], [9]], np.int32), logprobs=np.log(np.array([[0.5], [0.25]], np.float32)),
                           log_tail=np.log(np.array([0.5, 0.75], np.float32)), sampled=np.array([-0.7, -3.0], np.float32))  # fmt: skip
    batch = assemble([labelled, ScoredRollout(drawn, signal)], SignalSpec("topk", 1.0, 1, rollouts_only=True))
    np.testing.assert_array_equal(batch.behavior_logprobs.numpy(), np.array([np.nan, -0.5, -1.5], np.float32))
    np.testing.assert_array_equal(batch.sampled_logprobs.numpy(), np.array([np.nan, -0.7, -3.0], np.float32))
    found = sampled_tokens(batch, 1.0, None)
    assert found is not None
    assert found.valid.tolist() == [False, True, True]
    assert assemble([labelled], None).behavior_logprobs is None
