"""Whether an engine and the trainer mean the same by the same weights: both score the tokens that the engine sampled.

An engine that disagrees makes rollouts that are not the student's: off-policy without anyone saying so. So after every push the first
rollouts written with the new weights are scored by the trainer too, before it changes them.

Shape suffixes: ``P`` packed tokens, ``N`` response tokens, ``D`` hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np
import torch

from bbopd.errors import EngineError
from bbopd.modeling import output_head, packed_hidden
from bbopd.modeling.head import undisturbed
from bbopd.ops import linear_logprobs
from bbopd.types import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DEFAULT_LIMITS = {torch.float32: 0.001, torch.bfloat16: 0.1}
"""Nats: how far the mean difference may go where a run sets no limit of its own."""


class AgreementCheck:
    """Compares the logprobs of rollouts with those of ``model`` in ``compute_dtype``, on about ``tokens`` tokens a call.

    ``limit`` bounds the mean absolute difference, in nats; None takes that of the dtype in `DEFAULT_LIMITS`.
    """

    def __init__(self, model: PreTrainedModel, *, compute_dtype: torch.dtype, tokens: int, limit: float | None = None) -> None:
        self._model = model
        self._head = output_head(model)
        self._dtype = compute_dtype
        self._tokens = tokens
        self._limit = DEFAULT_LIMITS[compute_dtype] if limit is None else limit

    def __call__(self, rollouts: Iterable[Rollout], version: int) -> Mapping[str, float]:
        """Figures for the run's metrics, from rollouts of ``version`` (the weights that the model has now); none where there are none.

        Raises `EngineError` where the mean difference is above the limit, or not a number.
        """
        chosen = self._choose(rollouts, version)
        if not chosen:
            return {}
        difference_N = np.abs(self._score(chosen) - np.concatenate([_logprobs(rollout) for rollout in chosen]))
        mean, largest = float(difference_N.mean()), float(difference_N.max())
        if not mean <= self._limit:
            raise EngineError(
                f"the engine's logprobs of {len(difference_N)} tokens that it sampled differ from the trainer's by {mean:.4g} nats on "
                f"average and {largest:.4g} at most, with the limit {self._limit:g} (rollouts.agreement.limit): its rollouts are not the "
                "student's own. Take rollouts.engine=hf, or student.dtype=float32; raise the limit only if you know why they differ"
            )
        return {"engine_difference_mean": mean, "engine_difference_max": largest, "engine_compared_tokens": len(difference_N)}

    def _choose(self, rollouts: Iterable[Rollout], version: int) -> list[Rollout]:
        chosen: list[Rollout] = []
        tokens = 0
        for rollout in sorted(rollouts, key=lambda rollout: rollout.draw):
            if rollout.logprobs is None or rollout.weights_version != version or tokens >= self._tokens:
                continue
            chosen.append(rollout)
            tokens += len(rollout)
        return chosen

    @torch.no_grad()
    def _score(self, rollouts: Sequence[Rollout]) -> np.ndarray:
        """Logprobs [N] of the response tokens at the temperature of sampling."""
        device = self._head.weight_VD.device
        lengths = [len(rollout.all_ids) for rollout in rollouts]
        boundaries = [0, *accumulate(lengths)]
        rows_N = np.concatenate([np.arange(end - len(rollout) - 1, end - 1) for rollout, end in zip(rollouts, boundaries[1:], strict=True)])
        ids_P = torch.tensor([token for rollout in rollouts for token in rollout.all_ids], device=device)
        positions_P = torch.cat([torch.arange(length, device=device) for length in lengths])
        with undisturbed(self._model), torch.autocast(device.type, dtype=torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            hidden_PD = packed_hidden(self._model, ids_P, positions_P, torch.tensor(boundaries))
        found = linear_logprobs(
            hidden_PD[torch.from_numpy(rows_N).to(device)].to(self._dtype),
            self._head.weight_VD.to(self._dtype),
            token_ids=ids_P[torch.from_numpy(rows_N + 1).to(device)],
            temperature=rollouts[0].temperature,
            bias=self._head.bias,
            logit_scale=self._head.logit_scale,
            logit_softcap=self._head.logit_softcap,
        )
        assert found.sampled is not None, "token_ids were given"
        return found.sampled.float().cpu().numpy()


def _logprobs(rollout: Rollout) -> np.ndarray:
    assert rollout.logprobs is not None, "only rollouts with logprobs are chosen"
    return rollout.logprobs
