"""Whether an engine and the trainer mean the same by the same weights: both score the tokens that the engine sampled.

An engine that disagrees makes rollouts that are not the student's: off-policy without anyone saying so. So after every push the first
rollouts written with the new weights are scored by the trainer too, before it changes them.

Shape suffix: ``N`` response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch

from bbopd.errors import EngineError
from bbopd.modeling import output_head
from bbopd.modeling.response_logprobs import response_logprobs
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
        own_N = response_logprobs(self._model, self._head, chosen, compute_dtype=self._dtype)
        difference_N = np.abs(own_N - np.concatenate([_logprobs(rollout) for rollout in chosen]))
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


def _logprobs(rollout: Rollout) -> np.ndarray:
    assert rollout.logprobs is not None, "only rollouts with logprobs are chosen"
    return rollout.logprobs
