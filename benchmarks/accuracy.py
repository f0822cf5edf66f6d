"""Errors against float64, on a size that float64 can afford."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bbopd import FullTeacher
from benchmarks import distill, logprobs
from benchmarks.cases import Case
from benchmarks.contest import Contestant
from benchmarks.inputs import Inputs, draw

ERROR_N, ERROR_V = 256, 8192
NEAR_NOISE = 0.01  # in logits: a KL of about 5e-5 at T = 1


def error_case(case: Case) -> Case:
    """Few of the tokens; on a CPU also few of the logits."""
    return case.resized(ERROR_N, ERROR_V if case.device == "cpu" else case.V)


def near_case(case: Case) -> Case:
    """A student that is its teacher but for a little noise, and no cross-entropy to hide the KL's gradient.

    At temperature T the noise is T times as large, so that the KL stays the same.
    """
    return replace(error_case(case), ce_weight=0.0, kd_weight=1.0, teacher_noise=NEAR_NOISE * case.temperature)


def exact_gradients(inputs: Inputs, takes_head: bool = False) -> tuple[Tensor, ...]:
    """(loss, dH, dW) of the same stored inputs, in float64, without dW where the head is frozen; ``takes_head`` for those that are given
    the teacher's head, not its logits."""
    hidden, weight = (leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in inputs.leaves)
    teacher = inputs.teacher
    if takes_head:
        assert inputs.teacher_weight is not None
        teacher = FullTeacher(logits=hidden.detach() @ inputs.teacher_weight.double().T)
    loss = distill.eager_loss(hidden, weight, teacher, inputs.labels, inputs.case)
    return loss.detach(), *torch.autograd.grad(loss, [leaf for leaf in (hidden, weight) if leaf.requires_grad])


def relative_error(found: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth."""
    return float((found.double() - exact).norm() / exact.norm())


def gradient_errors(contestants: list[Contestant], case: Case) -> dict[str, float]:
    """By name, the larger of the two gradients' relative errors, of those whose loss is the case's."""
    inputs = draw(case)
    errors = {}
    for contestant in contestants:
        if not distill.claims_loss(contestant, case):
            continue
        _, *exact = exact_gradients(inputs, contestant.takes_head)
        contestant.prepare(inputs)()
        found = [leaf.grad for leaf in inputs.leaves if leaf.grad is not None]
        errors[contestant.name] = max(relative_error(a, b) for a, b in zip(found, exact, strict=True))
        inputs.drop_gradients()
    return errors


def logprobs_errors(contestants: list[Contestant], case: Case) -> dict[str, float]:
    """By name, the largest absolute error of any log-probability returned, in nats."""
    inputs = draw(case)
    exact = logprobs.torch_scores(inputs.hidden.detach().double(), inputs.weight.detach().double(), inputs.labels, case.K)
    errors = {}
    for contestant in contestants:
        if contestant.has_loss:
            found = contestant.prepare(inputs)()
            assert found is not None
            errors[contestant.name] = float((found.double() - exact).abs().max())
    return errors
