"""Whether an engine and the trainer mean the same by the same weights: both score the tokens that the engine sampled.

An engine that disagrees makes rollouts that are not the student's: off-policy without anyone saying so. So after every push the first
rollouts written with the new weights are scored by the trainer too, before it changes them.

In bfloat16 the two never agree to the last bit: an engine keeps the residual stream in it (and, on a CPU, the logits), where the trainer
only multiplies in it. What that makes of a logprob depends on the student: 0.03 nats for a trained one, ten times as much for one whose
layers have just been removed, which magnifies every error on its way up. So where the plain limit is exceeded, the same tokens are scored
once more with a rounded residual stream, and the student's own answer to that says what is to be expected.

Shape suffix: ``N`` response tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
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
_ROUNDINGS = 2.0  # how many times what rounding alone does it may be


class AgreementCheck:
    """Compares the logprobs of rollouts with those of ``model`` in ``compute_dtype``, on about ``tokens`` tokens a call.

    ``limit`` bounds the mean absolute difference, in nats. None takes that of the dtype in `DEFAULT_LIMITS` or, in bfloat16, twice what
    rounding makes of this student where that is more. Logits from ``vocab_size`` on only pad the head, and have no probability.
    """

    def __init__(
        self, model: PreTrainedModel, *, compute_dtype: torch.dtype, tokens: int, limit: float | None = None, vocab_size: int | None = None
    ) -> None:
        self._model = model
        self._head = output_head(model, vocab_size)
        self._dtype = compute_dtype
        self._tokens = tokens
        self._limit = limit

    def __call__(self, rollouts: Iterable[Rollout], version: int) -> Mapping[str, float]:
        """Figures for the run's metrics, from rollouts of ``version`` (the weights that the model has now); none where there are none.

        ``engine_kl`` estimates KL(engine || trainer) of a token in nats, as mean(r - 1 - log r) with r = q_trainer / q_engine (k3 of
        J. Schulman, "Approximating KL Divergence", 2020). Raises `EngineError` where the mean difference is above the limit, or not a
        number.
        """
        chosen = self._choose(rollouts, version)
        if not chosen:
            return {}
        own_N = self._score(chosen)
        ratio_N = own_N - np.concatenate([_logprobs(rollout) for rollout in chosen])
        mean, largest = float(np.abs(ratio_N).mean()), float(np.abs(ratio_N).max())
        figures = {
            "engine_difference_mean": mean,
            "engine_difference_max": largest,
            "engine_kl": float((np.expm1(ratio_N.astype(np.float64)) - ratio_N).mean()),
            "engine_compared_tokens": len(ratio_N),
        }
        limit, reason = DEFAULT_LIMITS[self._dtype] if self._limit is None else self._limit, "rollouts.agreement.limit"
        if not mean <= limit and self._limit is None and self._dtype == torch.bfloat16:
            with _residuals_in_bfloat16(self._model):
                figures["engine_rounding"] = rounding = float(np.abs(self._score(chosen) - own_N).mean())
            if _ROUNDINGS * rounding > limit:
                limit, reason = _ROUNDINGS * rounding, f"{_ROUNDINGS:g} times what rounding to bfloat16 makes of this student"
        if not mean <= limit:
            raise EngineError(
                f"the engine's logprobs of {len(ratio_N)} tokens that it sampled differ from the trainer's by {mean:.4g} nats on "
                f"average and {largest:.4g} at most, with the limit {limit:.4g} ({reason}): its rollouts are not the student's own. Take "
                "rollouts.engine=hf, or student.dtype=float32; raise rollouts.agreement.limit only if you know why they differ"
            )
        return figures

    def _score(self, rollouts: list[Rollout]) -> np.ndarray:
        return response_logprobs(self._model, self._head, rollouts, compute_dtype=self._dtype)

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


@contextmanager
def _residuals_in_bfloat16(model: PreTrainedModel) -> Iterator[None]:
    """Under autocast layers add bfloat16 to the residual stream; it is of that dtype itself where the embedding's output is."""
    hook = model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.to(torch.bfloat16))
    try:
        yield
    finally:
        hook.remove()
