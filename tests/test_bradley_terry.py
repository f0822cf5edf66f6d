"""The pair loss against its definition in float64, and its gradient against autograd, where scores are near, far and equal."""

from __future__ import annotations

import math

import pytest
import torch

from bbopd.objectives.bradley_terry import PairScores, bradley_terry, bradley_terry_gradient


def random_scores(seed: int, spread: float, prompts: int = 4) -> PairScores:
    random = torch.Generator().manual_seed(seed)
    prompt = torch.cat([torch.full((1 + index,), index) for index in range(prompts)])
    teacher = spread * torch.randn(prompts, generator=random, dtype=torch.float64)
    student = spread * torch.randn(len(prompt), generator=random, dtype=torch.float64)
    return PairScores(teacher, student, prompt)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 30.0, 1000.0])
def test_value_and_gradient_against_their_definition(spread):
    scores = random_scores(seed=int(spread) + 3, spread=spread)
    pairs = [(float(scores.teacher[p]), float(s)) for p, s in zip(scores.prompt, scores.student, strict=True)]
    values = [max(s - t, 0.0) + math.log1p(math.exp(-abs(s - t))) for t, s in pairs]
    assert float(bradley_terry(scores)) == pytest.approx(math.fsum(values) / len(values), rel=1e-12)
    teacher, student = scores.teacher.requires_grad_(), scores.student.requires_grad_()
    bradley_terry(scores).backward()
    by_teacher, by_student = bradley_terry_gradient(PairScores(teacher.detach(), student.detach(), scores.prompt))
    torch.testing.assert_close(by_teacher, teacher.grad, rtol=1e-10, atol=1e-300)
    torch.testing.assert_close(by_student, student.grad, rtol=1e-10, atol=1e-300)
    assert float(by_teacher.sum() + by_student.sum()) == pytest.approx(0.0, abs=1e-12), "only differences count"


def test_a_score_that_is_far_behind_keeps_a_gradient_in_float32():
    scores = PairScores(torch.tensor([-300.0, 0.0]), torch.tensor([300.0, 0.0]), torch.tensor([0, 1]))
    assert bradley_terry(scores) == pytest.approx((600 + math.log(2)) / 2)
    by_teacher, by_student = bradley_terry_gradient(scores)
    assert by_student.tolist() == [0.5, 0.25]
    assert by_teacher.tolist() == [-0.5, -0.25]


def test_accuracy_counts_pairs_and_margins_are_of_pairs():
    scores = PairScores(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0, 2.0, -1.0]), torch.tensor([0, 0, 0, 1]))
    assert scores.margins.tolist() == [1.0, 0.0, -1.0, 1.0]
    assert scores.accuracy() == pytest.approx(2.5 / 4)
