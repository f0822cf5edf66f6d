"""What an objective is, and what is said of one.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from bbopd.config import TeacherConfig
from bbopd.errors import TrainingError
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SignalSpec


@dataclass(frozen=True, slots=True)
class Facts:
    """What is true of an objective whatever its settings: one row of ``bbopd objectives``."""

    needs: tuple[Level, ...]
    """Access levels that it can use, the best first; empty where it asks no teacher."""
    computes: str
    """Its loss beside cross-entropy on labelled text, in one line."""
    source: str
    teacher_work: str = "nothing"
    """What the teacher does for it, beside the bytes that its level takes."""
    student_work: str = "nothing"
    """What the student's side does beyond a forward and a backward pass."""
    same_tokens: bool = True
    """Whether teacher and student must number the same tokens alike."""


class Objective(Protocol):
    """What is minimised: which teacher signal it needs, and its loss on a batch."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[Level, ...]:
        """Access levels that it can use with its settings, the best first; empty where it asks no teacher."""
        ...

    def signal(self, teacher: TeacherConfig) -> SignalSpec | None:
        """What to ask of the teacher for every response token, where ``teacher.signal`` is one of ``needs``; None: nothing."""
        ...

    def loss(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        batch: DistillBatch,
        *,
        ce_weight: float,
        kd_weight: float,
        normalizer: tuple[float, float] | None,
    ) -> DistillLoss:
        """The loss of ``batch``, from the hidden states of its ``target_rows`` and the head.

        ``normalizer`` holds the (ce_tokens, kd_tokens) of the whole optimizer step, so that micro-batches add up to its mean; None
        takes the batch's own.

        Raises
        ------
        TrainingError
            On a CPU, hidden states or weights that are not finite.
        """
        ...


@runtime_checkable
class Scheduled(Protocol):
    """An objective whose settings change over the run."""

    def at(self, progress: float) -> Objective:
        """What it is when ``progress`` (0 to 1) of the run's steps are done."""
        ...


def check_student(hidden_ND: Tensor, head: OutputHead) -> None:
    """`require_finite`, on a CPU only: a GPU would have to be waited for, and its NaN reaches the loss."""
    if hidden_ND.device.type == "cpu":
        require_finite(("hidden states", hidden_ND), ("output weights", head.weight_VD))


def require_finite(*parts: tuple[str, Tensor]) -> None:
    """Raises `TrainingError` for a student that has diverged: one of its named parts holds NaN or infinity."""
    for what, tensor in parts:
        if not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            raise TrainingError(f"the student's {what} are not finite: lower train.lr, or resume from an earlier checkpoint")
