"""The policy that a student shall not leave: its own weights of an earlier moment, frozen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bbopd.modeling import FrozenCopy, output_head
from bbopd.modeling.response_logprobs import response_logprobs
from bbopd.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ReferencePolicy:
    """A frozen copy of ``student`` as it is now, which says how likely it would have written what the student writes later.

    What the student does not train is not copied: of one with adapters these alone are.

    ``vocab_size`` and ``compute_dtype`` are as the trainer's, so that right after the copy both give the same logprobs; a pass takes about
    ``micro_batch_tokens``.
    """

    def __init__(
        self, student: PreTrainedModel, *, compute_dtype: torch.dtype, vocab_size: int | None = None, micro_batch_tokens: int = 4096
    ) -> None:
        self._copy = FrozenCopy(student)
        self._head = output_head(self._copy.model, vocab_size)
        self._compute_dtype = compute_dtype
        self._micro_batch_tokens = micro_batch_tokens

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """For each of ``rollouts`` [L] float32: of its tokens, at its temperature of sampling."""
        found: list[np.ndarray] = []
        for batch in _in_batches(rollouts, self._micro_batch_tokens):
            scored_N = response_logprobs(self._copy.model, self._head, batch, compute_dtype=self._compute_dtype)
            found += np.split(scored_N, np.cumsum([len(rollout) for rollout in batch])[:-1])
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Those of its weights that the student trains, by name, tied ones once."""
        return self._copy.tensors()

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights that `tensors` gave. Raises `ValueError` for those of another model; nothing has changed then."""
        self._copy.load_tensors(tensors)


def _in_batches(rollouts: Sequence[Rollout], tokens: int) -> Iterator[list[Rollout]]:
    batch: list[Rollout] = []
    size = 0
    for rollout in rollouts:
        if batch and size + len(rollout.all_ids) > tokens:
            yield batch
            batch, size = [], 0
        batch.append(rollout)
        size += len(rollout.all_ids)
    if batch:
        yield batch
