"""The ids that a student has its teacher asked about: at every response token its own best ones, and the token itself.

An engine that has the logits at hand names them as it samples (``HFEngine(candidates=...)``); for what it did not write itself, labelled
sequences above all, the student reads the sequence once more.

Shape suffixes: ``N`` response tokens, ``K`` candidates of a token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bbopd.modeling import output_head
from bbopd.modeling.response_logprobs import score_responses
from bbopd.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PACKED_TOKENS = 2048  # of one forward pass


class CandidateChooser:
    """Gives each rollout the ``count`` best ids of ``model`` as it is when called; those that have candidates keep them.

    ``vocab_size`` is that of the tokens: ids from there on only pad the head, and are never chosen.
    """

    def __init__(self, model: PreTrainedModel, *, count: int, compute_dtype: torch.dtype, vocab_size: int) -> None:
        self._model = model
        self._head = output_head(model, vocab_size).without_padding()
        self._count, self._dtype = min(count, vocab_size), compute_dtype

    def __call__(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        """The same rollouts in the same order, each with ``candidate_ids``."""
        chosen: list[Rollout] = []
        for part in _parts(rollouts):
            chosen.extend(self._choose(part) if part[0].candidate_ids is None else part)
        return chosen

    def _choose(self, rollouts: Sequence[Rollout]) -> list[Rollout]:
        found = score_responses(self._model, self._head, rollouts, compute_dtype=self._dtype, top_k=self._count)
        assert found.topk_ids is not None, "top_k was asked for"
        own_N = torch.tensor([token for rollout in rollouts for token in rollout.token_ids], device=found.topk_ids.device)
        ids_NK = with_own_tokens(found.topk_ids, own_N).to("cpu", torch.int32).numpy()
        bounds = np.cumsum([len(rollout) for rollout in rollouts])[:-1]
        return [replace(rollout, candidate_ids=ids) for rollout, ids in zip(rollouts, np.split(ids_NK, bounds), strict=True)]


def with_own_tokens(ids_NK: Tensor, own_N: Tensor) -> Tensor:
    """``ids_NK``, best first, with the token ``own_N`` in place of the last one where it is not among them."""
    is_missing_N1 = (ids_NK != own_N[:, None]).all(dim=1, keepdim=True)
    return torch.cat([ids_NK[:, :-1], torch.where(is_missing_N1, own_N[:, None], ids_NK[:, -1:])], dim=1)


def _parts(rollouts: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    """Neighbours that need the same, as many as fit one forward pass."""
    part: list[Rollout] = []
    tokens = 0
    for rollout in rollouts:
        is_other = bool(part) and (rollout.candidate_ids is None) != (part[0].candidate_ids is None)
        if part and (is_other or tokens + len(rollout.all_ids) > _PACKED_TOKENS):
            yield part
            part, tokens = [], 0
        part.append(rollout)
        tokens += len(rollout.all_ids)
    if part:
        yield part
