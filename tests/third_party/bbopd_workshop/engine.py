"""An engine that writes with a copy of the student."""

from __future__ import annotations

import copy
from collections.abc import AsyncIterator, Iterable, Mapping
from typing import Any

from torch import Tensor

from bbopd.pipeline.plugged import EngineSetting
from bbopd.rollouts.hf import HFEngine
from bbopd.types import Prompt, Rollout, Sampling


class Copying:
    def __init__(self, setting: EngineSetting, options: Mapping[str, Any]) -> None:
        self._engine = HFEngine(
            copy.deepcopy(setting.model),
            eos_token_ids=setting.stop_token_ids,
            pad_token_id=setting.stop_token_ids[0],
            vocab_size=setting.vocab_size,
            compute_dtype=setting.compute_dtype,
            **options,
        )

    def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        return self._engine.generate(prompts, sampling)

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        await self._engine.load_weights(weights, version)
