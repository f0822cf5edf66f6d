"""A model as an evaluation sees it: hidden states of the response tokens, and the head that the fused ops take.

Shape suffixes: ``P`` packed tokens, ``N`` response tokens, ``D`` hidden, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from bbopd.modeling import output_head, packed_hidden
from bbopd.modeling.head import undisturbed
from bbopd.modeling.shared_prompts import response_hidden
from bbopd.objectives.base import require_finite
from bbopd.ops import linear_distill, linear_logprobs
from bbopd.types import DistillBatch, Divergence, OpTeacher, Rollout, ScoredRollout, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKED_TOKENS = 2048  # of one forward pass, prompts included

Item = TypeVar("Item", Rollout, ScoredRollout)


class StudentView:
    """Measures ``model`` as it is when a method is called: in eval mode, without gradients, its own modes left as they were.

    ``compute_dtype`` is that of the body's matrix products, None the weights' own. Logits from
    ``vocab_size`` on are padding. Raises `TrainingError` for a model that has diverged.
    """

    def __init__(self, model: PreTrainedModel, *, compute_dtype: torch.dtype | None = None, vocab_size: int | None = None) -> None:
        require_finite(*((f"weights {name}", parameter) for name, parameter in model.named_parameters()))
        self._model = model
        self._head = output_head(model, vocab_size).without_padding()
        self._compute_dtype = compute_dtype
        self.device = self._head.weight_VD.device

    @torch.no_grad()
    def hidden(self, batch: DistillBatch) -> Tensor:
        """Hidden states [N, D] that predict the batch's response tokens. Raises `TrainingError` where they are not finite."""
        device = self.device
        with self._computing():
            hidden_PD = packed_hidden(self._model, batch.input_ids.to(device), batch.position_ids.to(device), batch.boundaries)
        return self._for_head(hidden_PD[batch.target_rows.to(device)])

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], *, top_k: int = 0) -> TokenLogprobs:
        """`linear_logprobs` of the response tokens [N] of ``rollouts``, their own included. A prompt that several share is run once."""
        with self._computing():
            hidden_ND = response_hidden(self._model, rollouts)
        ids_N = torch.tensor([token for rollout in rollouts for token in rollout.token_ids], device=self.device)
        return self.logprobs(self._for_head(hidden_ND), token_ids=ids_N, top_k=top_k)

    @torch.no_grad()
    def logprobs(self, hidden_ND: Tensor, **wanted: Any) -> TokenLogprobs:
        """`linear_logprobs` with this model's head, at temperature 1."""
        return linear_logprobs(hidden_ND, self._head.weight_VD, **wanted, **self._head.options)

    @torch.no_grad()
    def divergence(self, hidden_ND: Tensor, teacher: OpTeacher, name: Divergence) -> Tensor:
        """Divergence [N] in nats from ``teacher`` at temperature 1, with this model's head."""
        found = linear_distill(
            hidden_ND, self._head.weight_VD, teacher, temperature=1.0, ce_weight=0.0, kd_weight=1.0, divergence=name, **self._head.options
        )
        return found.kd

    @contextmanager
    def _computing(self) -> Iterator[None]:
        mixed = self._compute_dtype not in (None, self._head.weight_VD.dtype)
        with undisturbed(self._model), torch.autocast(self.device.type, dtype=self._compute_dtype if mixed else None, enabled=mixed):
            yield

    def _for_head(self, hidden_ND: Tensor) -> Tensor:
        hidden_ND = hidden_ND.to(self._head.weight_VD.dtype)
        require_finite(("hidden states", hidden_ND))
        return hidden_ND


def in_batches(items: Iterable[Item], packed_tokens: int = PACKED_TOKENS) -> Iterator[list[Item]]:
    """Items in their order, in lists of at most ``packed_tokens`` tokens, prompts included, and at least one item."""
    batch: list[Item] = []
    size = 0
    for item in items:
        length = token_count(item)
        if batch and size + length > packed_tokens:
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += length
    if batch:
        yield batch


def token_count(item: Rollout | ScoredRollout) -> int:
    return len((item.rollout if isinstance(item, ScoredRollout) else item).all_ids)


def sequence_of_rows(batch: DistillBatch) -> Tensor:
    """For each of the N response tokens, the sequence [N] of the batch that it belongs to."""
    return torch.searchsorted(batch.boundaries.to(batch.target_rows), batch.target_rows, right=True) - 1


def sum_by_sequence(values_N: Tensor, batch: DistillBatch) -> list[float]:
    """Sums [S] over the tokens of each sequence, in fp64."""
    sums_S = torch.zeros(len(batch.boundaries) - 1, dtype=torch.float64)
    return sums_S.index_add_(0, sequence_of_rows(batch).cpu(), values_N.double().cpu()).tolist()
