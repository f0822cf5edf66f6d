"""Bradley-Terry: how sure a score is that the teacher's answer is the better one (Bradley & Terry 1952; GAD, 2511.10643, eq. 3).

    loss = mean over pairs of -log sigmoid(D(x, y_t) - D(x, y_s))

A teacher's answer may stand in several pairs, one with each answer of the student. Shape suffixes: ``P`` prompts, each with one
answer of the teacher; ``S`` answers of the student, to those prompts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, eq=False)
class PairScores:
    """What a discriminator says: ``teacher`` [P], ``student`` [S], and ``prompt`` [S] int64, the prompt that each answered."""

    teacher: Tensor
    student: Tensor
    prompt: Tensor

    @property
    def margins(self) -> Tensor:
        """[S]: by how much the teacher's answer is ahead of each of the student's."""
        return self.teacher[self.prompt] - self.student

    @property
    def is_finite(self) -> bool:
        """Whether all are numbers: a discriminator that has diverged gives NaN or infinite ones."""
        return bool(torch.isfinite(self.teacher).all() and torch.isfinite(self.student).all())

    def accuracy(self) -> float:
        """Share of pairs in which the teacher's answer is ahead; one of equal scores counts half."""
        margins_S = self.margins
        return float(((margins_S > 0).double() + 0.5 * (margins_S == 0).double()).mean())


def bradley_terry(scores: PairScores) -> Tensor:
    """The loss, a scalar; its value and gradient are exact however far the scores are apart."""
    return -F.logsigmoid(scores.margins).mean()


def bradley_terry_gradient(scores: PairScores) -> tuple[Tensor, Tensor]:
    """The loss's derivatives by ``teacher`` [P] and ``student`` [S].

    With them each score can be followed back by itself, so that no two answers of a pair need be in the same forward pass.
    """
    by_student_S = torch.sigmoid(-scores.margins) / max(1, scores.student.numel())
    by_teacher_P = torch.zeros_like(scores.teacher).index_add_(0, scores.prompt, -by_student_S)
    return by_teacher_P, by_student_S
