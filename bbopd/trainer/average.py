"""An exponential moving average of the weights that are trained: a slower student, beside the one that learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bbopd.errors import CheckpointError
from bbopd.modeling import FrozenCopy, trained_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class WeightAverage:
    """``average = decay * average + (1 - decay) * weights`` after every update, beginning with the weights as they are.

    It is kept in float32, like the weights: in bfloat16 an update of a thousandth would be rounded away. What is not trained is the
    student's own and takes no memory; of one with adapters, A and B are averaged each for itself. A ``decay`` of 1 stays with the weights
    that it began with.
    """

    def __init__(self, student: PreTrainedModel, decay: float) -> None:
        self.decay = decay
        self._student = student
        self._copy = FrozenCopy(student)

    @property
    def model(self) -> PreTrainedModel:
        """The averaged student, in eval mode."""
        return self._copy.model

    @torch.no_grad()
    def update(self) -> None:
        """Follow the student by one step."""
        own, theirs = self._copy.tensors(), trained_weights(self._student)
        torch._foreach_lerp_(list(own.values()), [theirs[name] for name in own], 1.0 - self.decay)

    def tensors(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return self._copy.tensors()

    def load_tensors(self, files: Mapping[str, Mapping[str, Tensor]], name: str) -> None:
        """Go on from `tensors`, file ``name`` among ``files`` of a checkpoint. Raises `CheckpointError` for those of another run."""
        if name not in files:
            raise CheckpointError("the checkpoint has no average of the weights: set teacher.self.weights back, or output to a new folder")
        try:
            self._copy.load_tensors(files[name])
        except ValueError as error:
            raise CheckpointError(f"the checkpoint's average of the weights does not fit ({error}): set output to a new folder") from error
