"""The clipped policy gradient against float64 autograd of the published formulas.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bbopd.errors import TrainingError
from bbopd.objectives.policy_gradient import Clip, policy_gradient_loss, sampled_advantages
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, SampledTeacher
from tests.distill_oracle import compare, draw, logits_of
from tests.test_objectives import batch_of

CLIPS = [None, (0.2, 0.2), (0.1, 0.28)]


def log_q_of(z_NV: Tensor, teacher: SampledTeacher) -> Tensor:
    return (z_NV / teacher.temperature).log_softmax(1).gather(1, teacher.token_ids[:, None])[:, 0]


def formula(z_NV: Tensor, batch: DistillBatch, teacher: SampledTeacher, *, clip: Clip | None, ce_weight: float, kd_weight: float,
            reference: Tensor | None = None, reference_kl=0.0, t2_scaling=False) -> tuple[Tensor, Tensor]:  # fmt: skip
    """PPO-clip (1707.06347, eq. 7) plus k3 (2402.03300, eq. 4) plus cross-entropy, row by row; (loss, surrogate [N])."""
    log_q_N, A_N = log_q_of(z_NV, teacher), teacher.advantages
    A_N = teacher.logprobs - teacher.behavior_logprobs if A_N is None else A_N
    cost_N = []
    for i in range(z_NV.shape[0]):
        if teacher.valid is not None and not teacher.valid[i]:
            cost_N.append(z_NV.new_zeros(()))
            continue
        ratio = (log_q_N[i] - teacher.behavior_logprobs[i].double()).exp()
        held = ratio if clip is None else ratio.clamp(1 - clip[0], 1 + clip[1])
        cost = -torch.minimum(ratio * A_N[i], held * A_N[i])
        if reference is not None:
            apart = reference[i].double() - log_q_N[i]
            cost = cost + reference_kl * (apart.exp() - apart - 1)
        cost_N.append(cost * (teacher.temperature**2 if t2_scaling else 1.0))
    surrogate_N = torch.stack(cost_N)
    labelled = batch.labels != -100
    ce_N = torch.where(labelled, -z_NV.log_softmax(1).gather(1, batch.labels.clamp(min=0)[:, None])[:, 0], 0.0)
    signals = z_NV.shape[0] if teacher.valid is None else int(teacher.valid.sum())
    weight_N = batch.token_weight.double()
    loss = ce_weight * (weight_N * ce_N).sum() / labelled.sum() + kd_weight * (weight_N * surrogate_N).sum() / signals
    return loss, surrogate_N.detach()


def drawn(N: int, V: int, temperature: float, dtype: torch.dtype, kind: str, seed: int):
    """A student, its head's odd parts, and sampled tokens whose ratios go from 1/20 to 20, with advantages of both signs."""
    hidden, weight, generator = draw(N, V + 4, D=12, dtype=dtype, seed=seed)  # the last 4 logits are padding
    bias = torch.randn(V + 4, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = OutputHead(weight, bias, 1.3, 5.0, V)
    valid = torch.rand(N, generator=generator) < 0.7
    ids = torch.randint(0, V, (N,), generator=generator)
    bare = SampledTeacher(token_ids=ids, behavior_logprobs=torch.zeros(N), temperature=temperature)
    log_q_N = log_q_of(logits_of(hidden, weight, bias, 1.3, 5.0, V), bare).detach()
    behavior = (log_q_N - 3 * (2 * torch.rand(N, generator=generator) - 1)).float()
    known = (behavior.double() + torch.randn(N, generator=generator, dtype=torch.float64)).float()
    given = {"logprobs": known} if kind == "logprobs" else {"advantages": 2 * torch.randn(N, generator=generator)}
    teacher = SampledTeacher(token_ids=ids, behavior_logprobs=behavior, temperature=temperature, valid=valid, **given)
    labels = torch.where(valid | (torch.rand(N, generator=generator) < 0.2), -100, torch.randint(0, V, (N,), generator=generator))
    reference = (log_q_N + torch.randn(N, generator=generator, dtype=torch.float64)).float()
    return hidden, head, batch_of(teacher, labels), reference


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.7])
@pytest.mark.parametrize("kind", ["logprobs", "advantages"])
def test_value_and_gradient_are_those_of_the_formulas(kind: str, temperature: float, clip: Clip | None) -> None:
    seed = torch.seed() % 2**31
    print("seed", seed)  # shown where it fails
    for dtype, tolerance in ((torch.float64, 1e-9), (torch.float32, 3e-5)):
        hidden, head, batch, reference = drawn(40, 37, temperature, dtype, kind, seed)
        how = {"clip": clip, "ce_weight": 0.3, "kd_weight": 1.2, "t2_scaling": temperature == 2.0}
        for penalty in ({}, {"reference_kl": 0.7}):
            asked = penalty and {"reference_logprobs": reference}
            ours = policy_gradient_loss(hidden, head, batch, batch.teacher, normalizer=None, **how, **penalty, **asked)
            z_NV = logits_of(hidden, head.weight_VD, head.bias, 1.3, 5.0, 37)
            theirs, surrogate_N = formula(z_NV, batch, batch.teacher, reference=reference if penalty else None, **how, **penalty)
            compare(ours.loss, theirs, (hidden, head.weight_VD, head.bias), tolerance)
            torch.testing.assert_close(ours.kd.double(), surrogate_N, rtol=tolerance, atol=tolerance)


def test_metrics_say_what_became_of_the_ratios() -> None:
    hidden, head, batch, reference = drawn(60, 37, 1.0, torch.float64, "advantages", seed=3)
    teacher = batch.teacher
    with torch.no_grad():
        log_q_N = log_q_of(logits_of(hidden, head.weight_VD, head.bias, 1.3, 5.0, 37), teacher)
        ratio, A = (log_q_N - teacher.behavior_logprobs)[teacher.valid].exp(), teacher.advantages[teacher.valid]
        apart = (reference - log_q_N)[teacher.valid]
    out = policy_gradient_loss(
        hidden, head, batch, teacher, clip=(0.1, 0.3), reference_logprobs=reference, reference_kl=0.1, ce_weight=1.0, kd_weight=1.0,
        normalizer=None,
    )  # fmt: skip
    expected = {
        "importance_ratio": ratio.mean(),
        "importance_ratio_max": ratio.max(),
        "clipped_high": ((ratio > 1.3) & (A > 0)).double().mean(),
        "clipped_low": ((ratio < 0.9) & (A < 0)).double().mean(),
        "reference_kl": (apart.exp() - apart - 1).mean(),
        "ratio_capped": 0.0,
        "floored": 0.0,
    }
    assert 0 < expected["clipped_high"] < 1
    assert 0 < expected["clipped_low"] < 1
    assert {name: float(out.metrics[name]) for name in expected} == pytest.approx({name: float(x) for name, x in expected.items()})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_micro_batches_add_up_and_one_may_be_without_a_signal(dtype: torch.dtype) -> None:
    hidden, head, batch, reference = drawn(24, 37, 2.0, dtype, "logprobs", seed=11)
    teacher = replace(batch.teacher, valid=batch.teacher.valid & (torch.arange(24) >= 7))  # the first part has none
    how = {"clip": (0.2, 0.28), "reference_kl": 0.3, "ce_weight": 0.4, "kd_weight": 0.9, "t2_scaling": True}
    counts = (float((batch.labels != -100).sum()), float(teacher.valid.sum()))
    whole = policy_gradient_loss(hidden, head, batch, teacher, reference_logprobs=reference, normalizer=None, **how).loss
    parts = []
    for rows in (slice(0, 7), slice(7, 8), slice(8, 24)):
        cut = replace(batch, labels=batch.labels[rows], token_weight=batch.token_weight[rows])
        some = replace(
            teacher, token_ids=teacher.token_ids[rows], behavior_logprobs=teacher.behavior_logprobs[rows],
            logprobs=teacher.logprobs[rows], valid=teacher.valid[rows],
        )  # fmt: skip
        parts.append(policy_gradient_loss(hidden[rows], head, cut, some, reference_logprobs=reference[rows], normalizer=counts, **how).loss)
    compare(sum(parts), whole, (hidden, head.weight_VD, head.bias), 1e-10 if dtype == torch.float64 else 1e-5)


def test_ratios_beyond_the_cap_are_counted_and_keep_their_direction() -> None:
    hidden, weight, _ = draw(2, 9)
    teacher = SampledTeacher(
        token_ids=torch.tensor([2, 5]), behavior_logprobs=torch.tensor([-60.0, -70.0]), advantages=torch.tensor([1.0, -2.0])
    )
    batch = batch_of(teacher, torch.full((2,), -100))
    out = policy_gradient_loss(hidden, OutputHead(weight), batch, teacher, clip=None, ce_weight=0.0, kd_weight=1.0, normalizer=None)
    assert out.metrics["ratio_capped"].item() == 2
    torch.testing.assert_close(out.kd, torch.tensor([-1e4, 2e4], dtype=torch.float64))
    log_q_N = log_q_of(logits_of(hidden, weight), teacher)
    as_a_weight = (torch.tensor([-1e4, 2e4]) * batch.token_weight * log_q_N).mean()
    for ours, theirs in zip(
        torch.autograd.grad(out.loss, (hidden, weight)), torch.autograd.grad(as_a_weight, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    far = policy_gradient_loss(
        hidden, OutputHead(weight), batch, teacher, clip=(0.2, 0.2), reference_logprobs=torch.tensor([20.0, -0.1]), reference_kl=1.0,
        ce_weight=0.0, kd_weight=1.0, normalizer=None,
    )  # fmt: skip
    assert far.metrics["ratio_capped"].item() == 3  # the reference's counts as well
    assert far.loss.isfinite()


def test_a_token_that_the_teacher_rules_out_counts_as_its_floor() -> None:
    teacher = SampledTeacher(
        token_ids=torch.zeros(3, dtype=torch.int64), behavior_logprobs=torch.tensor([-1.0, -2.0, -3.0]),
        logprobs=torch.tensor([-torch.inf, -2.5, -torch.inf]), valid=torch.tensor([True, True, False]),
    )  # fmt: skip
    advantages_N, floored = sampled_advantages(teacher)
    assert advantages_N.tolist() == [-29.0, -0.5, -27.0]
    assert floored.item() == 1  # the last carries no signal


def test_a_batch_without_sampled_tokens_is_cross_entropy() -> None:
    hidden, head, batch, _ = drawn(8, 37, 1.0, torch.float64, "logprobs", seed=5)
    labels = torch.arange(8)
    batch = replace(batch, labels=labels, teacher=None)
    out = policy_gradient_loss(hidden, head, batch, None, clip=None, ce_weight=1.0, kd_weight=1.0, normalizer=None)
    ce_N = -logits_of(hidden, head.weight_VD, head.bias, 1.3, 5.0, 37).log_softmax(1)[range(8), labels]
    assert out.loss.item() == pytest.approx((batch.token_weight * ce_N).mean().item())


def test_a_diverged_student_is_a_training_error() -> None:
    hidden, head, batch, _ = drawn(8, 37, 1.0, torch.float32, "logprobs", seed=5)
    with pytest.raises(TrainingError, match="hidden states are not finite"):
        policy_gradient_loss(hidden * float("inf"), head, batch, batch.teacher, clip=None, ce_weight=1.0, kd_weight=1.0, normalizer=None)
