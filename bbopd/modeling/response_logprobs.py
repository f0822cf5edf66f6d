"""What a model thinks of answers that are written: of every token of theirs, from one packed pass.

Shape suffixes: ``P`` packed tokens, ``N`` response tokens, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bbopd.modeling.head import undisturbed
from bbopd.modeling.packed import packed_hidden
from bbopd.ops import linear_logprobs
from bbopd.output_head import OutputHead
from bbopd.types import Rollout, TokenLogprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def response_logprobs(model: PreTrainedModel, head: OutputHead, rollouts: Sequence[Rollout], *, compute_dtype: torch.dtype) -> np.ndarray:
    """Logprobs [N] float32 of the response tokens of ``rollouts``, at the temperature of sampling, which is that of the first one.

    ``head`` is the model's. torch.bfloat16 multiplies matrices in it. The model's modes are left as they were.
    """
    found = score_responses(model, head, rollouts, compute_dtype=compute_dtype, temperature=rollouts[0].temperature)
    assert found.sampled is not None, "it is always asked for"
    return found.sampled.float().cpu().numpy()


@torch.no_grad()
def score_responses(
    model: PreTrainedModel,
    head: OutputHead,
    rollouts: Sequence[Rollout],
    *,
    compute_dtype: torch.dtype,
    **wanted: Any,
) -> TokenLogprobs:
    """`linear_logprobs` of the response tokens [N] of ``rollouts``, their own logprobs included; ``wanted`` goes to that op as it is."""
    device = head.weight_VD.device
    lengths = [len(rollout.all_ids) for rollout in rollouts]
    boundaries = [0, *accumulate(lengths)]
    rows_N = np.concatenate([np.arange(end - len(rollout) - 1, end - 1) for rollout, end in zip(rollouts, boundaries[1:], strict=True)])
    ids_P = torch.tensor([token for rollout in rollouts for token in rollout.all_ids], device=device)
    positions_P = torch.cat([torch.arange(length, device=device) for length in lengths])
    with undisturbed(model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=compute_dtype == torch.bfloat16):
        hidden_PD = packed_hidden(model, ids_P, positions_P, torch.tensor(boundaries))
    return linear_logprobs(
        hidden_PD[torch.from_numpy(rows_N).to(device)].to(compute_dtype),
        head.weight_VD.to(compute_dtype),
        token_ids=ids_P[torch.from_numpy(rows_N + 1).to(device)],
        **head.options,
        **wanted,
    )
