"""How the engine draws tokens on a CPU: one random number a token, where vLLM draws one for every entry of the vocabulary, twice.

Imported in the engine's process alone. With a seed for each request, vLLM's sampler makes ``B x V`` exponential numbers and then again
``B x V`` from the requests' own generators, all on one core, and two whole softmaxes: more work than the model's own step. Inverting the
distribution's sums takes two passes over the logits and one number from each request's generator.

Shapes: ``B`` requests, ``V`` vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.outputs import LogprobsTensors, SamplerOutput
from vllm.v1.sample.sampler import Sampler

from bbopd.errors import ModelError
from bbopd.rollouts.sampling import sample_tokens
from bbopd.types import Sampling

_SCALED = Sampling(max_new_tokens=1, temperature=1.0)  # of logits that the temperature has divided


class RolloutSampler(Sampler):
    """vLLM's sampler, but for requests that are sampled from the whole vocabulary with a seed, asking the sampled token's logprob alone."""

    def forward(self, logits: Tensor, sampling_metadata: Any, predict_bonus_token: bool = False, **others: Any) -> SamplerOutput:
        if not is_plain(logits, sampling_metadata):
            return super().forward(logits, sampling_metadata, predict_bonus_token, **others)
        z_BV = self.apply_logits_processors(logits.float(), sampling_metadata, predict_bonus_token)
        z_BV = self.apply_temperature(z_BV, sampling_metadata.temperature, all_random=True)
        for processor in sampling_metadata.logitsprocs.argmax_invariant:
            z_BV = processor.apply(z_BV)
        drawn = [torch.rand((), dtype=torch.float64, generator=sampling_metadata.generators[row]) for row in range(len(z_BV))]
        try:
            ids_B, logprobs_B = sample_tokens(z_BV, torch.stack(drawn), _SCALED)
        except ModelError:
            ids_B, logprobs_B = torch.zeros(len(z_BV), dtype=torch.int64), torch.full((len(z_BV),), torch.nan)  # the trainer's to report
        ids_B1 = ids_B.to(torch.int32)[:, None]
        ranks_B = torch.zeros_like(ids_B)  # nobody reads them
        return SamplerOutput(sampled_token_ids=ids_B1, logprobs_tensors=LogprobsTensors(ids_B1, logprobs_B[:, None], ranks_B))


def is_plain(logits: Tensor, metadata: Any) -> bool:
    """Whether `RolloutSampler` draws these itself."""
    return bool(
        metadata.all_random
        and metadata.top_k is None
        and metadata.top_p is None
        and metadata.max_num_logprobs == 0
        and not metadata.logprob_token_ids
        and len(metadata.generators) == len(logits)
    )


class SamplerExtension:
    """Mixed into vLLM's worker (``worker_extension_cls``)."""

    def draw_one_number_a_token(self) -> None:
        runner = self.model_runner  # type: ignore[attr-defined]
        runner.sampler = RolloutSampler(runner.sampler.logprobs_mode)

    def expect_all_weights(self) -> None:
        self.weight_transfer_engine.is_filled = False  # type: ignore[attr-defined]
