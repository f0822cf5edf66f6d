"""Where each objective leads a student that can write anything: the optimum that theory names, reached by exact gradients in float64.

The student is a table of logits, one row for each of a few places (hidden states that are unit vectors, so that the head is the table).
Expectations over sampled tokens are written out: a batch has every token once, weighted by its probability.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig
from bbopd.objectives import OBJECTIVES, make_objective
from bbopd.output_head import OutputHead
from bbopd.types import DIVERGENCES, IGNORE_INDEX, CandidateTeacher, DistillBatch, FullTeacher, OpTeacher, SampledTeacher, TopKTeacher
from tests.distill_oracle import bucket
from tests.test_objectives import batch_of

P, V, K = 3, 8, 4
Loss = Callable[[Tensor, Tensor], Tensor]
SHOWN = {*DIVERGENCES, "mixed", "aligned", "policy_gradient", "sft", "seqkd", "verbal", "gad"}


def drawn(seed: int, spread: float = 1.5) -> Tensor:
    return spread * torch.randn(P, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def descend(loss_of: Loss, start_PV: Tensor) -> Tensor:
    """The student's log-probabilities [P, V] at the minimum of ``loss_of(hidden, table)``."""
    table = start_PV.T.contiguous().requires_grad_()  # [V, D] with D = P
    optimizer = torch.optim.LBFGS([table], max_iter=400, tolerance_grad=1e-10, tolerance_change=0.0, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(torch.eye(P, dtype=torch.float64), table)
        loss.backward()
        return loss

    optimizer.step(step)
    step()
    assert table.grad is not None
    assert table.grad.norm() < 1e-6, "the end is a stationary point"
    return table.detach().T.log_softmax(1)


def climb(loss_of: Loss, start_PV: Tensor, steps: int, rate: float) -> Tensor:
    """The same by plain gradient descent, for where ``loss_of`` depends on what the student now writes."""
    table = start_PV.T.contiguous().requires_grad_()
    for _ in range(steps):
        (gradient,) = torch.autograd.grad(loss_of(torch.eye(P, dtype=torch.float64), table), table)
        table = (table.detach() - rate * gradient).requires_grad_()
    return table.detach().T.log_softmax(1)


def loss_with(config: ObjectiveConfig, batch: DistillBatch, **weights: float) -> Loss:
    how = {"ce_weight": 0.0, "kd_weight": 1.0, **weights}
    return lambda hidden, table: make_objective(config).loss(hidden, OutputHead(table), batch, normalizer=None, **how).loss


def teacher_on(ids_PK: Tensor, log_p_PV: Tensor, kind: type = TopKTeacher) -> OpTeacher:
    tails = torch.stack([bucket(log_p_PV[place], ids_PK[place])[-1] for place in range(P)])
    return kind(ids_PK, log_p_PV.gather(1, ids_PK), tails)


def unlabelled(teacher: OpTeacher) -> DistillBatch:
    return replace(batch_of(teacher, torch.full((P,), IGNORE_INDEX)), token_weight=torch.ones(P))


def test_every_objective_is_shown_here():
    assert set(OBJECTIVES) == SHOWN


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_from_whole_distributions_leads_to_the_teacher(name, temperature):
    teacher = drawn(1)
    config = ObjectiveConfig(name=name, temperature=temperature, beta=0.3, skew=0.2)
    found = descend(loss_with(config, unlabelled(FullTeacher(logits=teacher))), drawn(2))
    torch.testing.assert_close(found.exp(), teacher.softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"),
    [("forward_kl", TopKTeacher), ("aligned", TopKTeacher), ("reverse_kl", CandidateTeacher), ("jsd", TopKTeacher),
     ("jsd", CandidateTeacher), ("skew_forward_kl", TopKTeacher), ("skew_reverse_kl", CandidateTeacher)],
)  # fmt: skip
def test_on_a_support_it_leads_to_p_there_and_to_the_tail_s_total_mass(name, kind):
    """What is inside the tail stays the student's: two that differ there, and nowhere else, are both at the optimum."""
    log_p = drawn(3).log_softmax(1)
    ids = log_p.topk(K).indices if kind is TopKTeacher else torch.stack([torch.arange(2, 2 + K)] * P)
    loss = loss_with(ObjectiveConfig(name=name, temperature=1.0), unlabelled(teacher_on(ids, log_p, kind)))
    inside = []
    for seed in (4, 5):
        found = descend(loss, drawn(seed)).exp()
        torch.testing.assert_close(found.gather(1, ids), log_p.exp().gather(1, ids), rtol=0, atol=1e-5)
        tail = found.scatter(1, ids, 0.0)
        torch.testing.assert_close(tail.sum(1), 1 - log_p.exp().gather(1, ids).sum(1), rtol=0, atol=1e-5)
        inside.append(tail / tail.sum(1, keepdim=True))
    assert (inside[0] - inside[1]).abs().amax() > 0.05
    theirs = log_p.exp().scatter(1, ids, 0.0)
    assert (inside[0] - theirs / theirs.sum(1, keepdim=True)).abs().amax() > 0.05


def test_truncated_and_renormalised_it_would_lead_to_p_over_a():
    """What top-k with its tail is there to avoid: the support is learned too large by 1 / a, and the rest of the vocabulary not at all."""
    log_p = drawn(3).log_softmax(1)
    best = log_p.topk(K)
    a = best.values.exp().sum(1, keepdim=True)
    assert a.max() < 0.97
    renormalised = TopKTeacher(best.indices, best.values - a.log(), torch.full((P,), -torch.inf, dtype=torch.float64))
    found = descend(loss_with(ObjectiveConfig(name="forward_kl", temperature=1.0), unlabelled(renormalised)), drawn(4)).exp()
    torch.testing.assert_close(found.gather(1, best.indices), best.values.exp() / a, rtol=0, atol=1e-5)
    assert found.scatter(1, best.indices, 0.0).sum(1).max() < 1e-5


def test_mixed_leads_each_side_to_its_own_teacher_s_distribution():
    teacher = drawn(6)
    config = ObjectiveConfig.model_validate({"name": "mixed", "temperature": 1.0, "labelled": {"name": "skew_forward_kl", "weight": 0.7},
                                             "rollouts": {"name": "skew_reverse_kl", "weight": 1.3, "skew": 0.3}})  # fmt: skip
    batch = replace(unlabelled(FullTeacher(logits=teacher)), labels=torch.tensor([3, IGNORE_INDEX, IGNORE_INDEX]))
    found = descend(loss_with(config, batch), drawn(7))
    torch.testing.assert_close(found.exp(), teacher.softmax(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["sft", "seqkd"])
def test_cross_entropy_leads_to_how_often_each_answer_is_there(name):
    frequency = drawn(8).softmax(1)
    every = torch.arange(V).repeat(P)
    batch = replace(batch_of(None, every), token_weight=frequency.flatten())

    def loss(hidden: Tensor, table: Tensor) -> Tensor:
        rows = hidden.repeat_interleave(V, dim=0)
        how = {"ce_weight": 1.0, "kd_weight": 0.0, "normalizer": (1.0, 1.0)}
        return make_objective(ObjectiveConfig(name=name)).loss(rows, OutputHead(table), batch, **how).loss

    torch.testing.assert_close(descend(loss, drawn(9)).exp(), frequency, rtol=0, atol=1e-5)


# ---------------------------------------------------------------- from what the student samples


def sampled_loss(
    config: ObjectiveConfig, told_PV: Tensor, log_ref_PV: Tensor | None, is_advantage: bool
) -> Callable[[Tensor, Tensor], Tensor]:
    """The expected loss of one token a place, sampled from the student as it now is; ``told_PV`` is what would be said of each token."""
    every = torch.arange(V).repeat(P)

    def loss(hidden: Tensor, table: Tensor) -> Tensor:
        log_q_PV = (hidden @ table.T).detach().log_softmax(1)
        told = told_PV if not is_advantage else told_PV - (log_q_PV.exp() * told_PV).sum(1, keepdim=True)
        said = {"advantages" if is_advantage else "logprobs": told.flatten()}
        teacher = SampledTeacher(token_ids=every, behavior_logprobs=log_q_PV.flatten(), valid=torch.ones(P * V, dtype=torch.bool), **said)
        batch = replace(
            batch_of(teacher, torch.full((P * V,), IGNORE_INDEX)),
            token_weight=log_q_PV.exp().flatten(),
            boundaries=torch.arange(P * V + 1, dtype=torch.int32),
            target_ids=every,
            reference_logprobs=None if log_ref_PV is None else log_ref_PV.flatten(),
        )
        rows = hidden.repeat_interleave(V, dim=0)
        how = {"ce_weight": 0.0, "kd_weight": 1.0, "normalizer": (1.0, 1.0)}
        return make_objective(config).loss(rows, OutputHead(table), batch, **how).loss

    return loss


def test_one_logprob_a_sampled_token_leads_to_the_teacher():
    log_p = drawn(10, 0.7).log_softmax(1)
    loss = sampled_loss(ObjectiveConfig(name="policy_gradient", temperature=1.0), log_p, None, is_advantage=False)
    torch.testing.assert_close(climb(loss, drawn(11, 0.5), 200, 3.0).exp(), log_p.exp(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["verbal", "gad"])
def test_rewards_lead_to_the_best_answer_and_a_reference_holds_back(name):
    """Without a reference all mass goes to the best answer. With k3 of weight b the gradient is that of E[r] - b KL(q_ref ‖ q), whose
    optimum is q = b q_ref / (l - r), with l such that it sums to 1."""
    rewards, log_ref = drawn(12, 0.5), drawn(13, 0.5).log_softmax(1)
    settings = {"gad": {"gad": {"kl_weight": 0.0}}, "verbal": {}}[name]
    config = ObjectiveConfig.model_validate({"name": name, "temperature": 1.0, **settings})
    found = climb(sampled_loss(config, rewards, None, is_advantage=True), torch.zeros(P, V, dtype=torch.float64), 150, 10.0).exp()
    assert found.gather(1, rewards.argmax(1, keepdim=True)).min() > 0.97
    weight = 0.5
    settings = {"gad": {"gad": {"kl_weight": weight}}, "verbal": {"kl_weight": weight}}[name]
    config = ObjectiveConfig.model_validate({"name": name, "temperature": 1.0, **settings})
    found = climb(sampled_loss(config, rewards, log_ref, is_advantage=True), log_ref, 300, 6.0).exp()
    low, high = rewards.amax(1, keepdim=True) + 1e-9, rewards.amax(1, keepdim=True) + weight
    for _ in range(80):
        middle = (low + high) / 2
        is_small = (weight * log_ref.exp() / (middle - rewards)).sum(1, keepdim=True) < 1
        low, high = torch.where(is_small, low, middle), torch.where(is_small, middle, high)
    torch.testing.assert_close(found, weight * log_ref.exp() / (middle - rewards), rtol=0, atol=1e-4)
