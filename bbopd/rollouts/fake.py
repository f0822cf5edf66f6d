"""A rollout engine without a model: a seeded table of next-token probabilities, for tests of everything around an engine.

Shapes: ``V`` vocabulary, ``L`` response tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TYPE_CHECKING

import numpy as np

from bbopd.types import FinishReason, Prompt, Rollout, Sampling

if TYPE_CHECKING:
    from torch import Tensor


class FakeEngine:
    """A first-order language model: token ``i`` is followed by a draw from row ``i`` of a random [V, V] table.

    Like the real engines it draws from (seed, draw) alone, ends at ``eos_token_id`` and reports the logprobs drawn from; top-p and
    top-k are not supported. ``delay`` seconds pass before each rollout; after ``fail_after`` of them it raises ``RuntimeError``.
    New weights change nothing but the version.
    """

    def __init__(
        self,
        vocab_size: int,
        *,
        eos_token_id: int,
        seed: int = 0,
        sharpness: float = 1.0,
        delay: float = 0.0,
        fail_after: int | None = None,
    ) -> None:
        self.logits_VV = sharpness * np.random.default_rng(seed).standard_normal((vocab_size, vocab_size))
        self.version = 0
        self._eos_token_id = eos_token_id
        self._delay, self._fail_after = delay, fail_after

    async def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]:
        if sampling.top_p < 1.0 or sampling.top_k:
            raise ValueError(f"FakeEngine draws from the whole distribution only, not with {sampling}")
        draw = 0
        async for prompt in prompts:
            if self._fail_after is not None and draw >= self._fail_after:
                raise RuntimeError(f"FakeEngine was told to fail after {self._fail_after} rollouts")
            await asyncio.sleep(self._delay)
            yield self._write(prompt, draw, sampling)
            draw += 1

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        for _ in weights:
            pass
        self.version = version

    def _write(self, prompt: Prompt, draw: int, sampling: Sampling) -> Rollout:
        random = np.random.default_rng([sampling.seed % 2**64, draw])
        stops = {self._eos_token_id, *sampling.stop_token_ids}
        current = prompt.token_ids[-1]
        ids: list[int] = []
        logprobs: list[float] = []
        finish_reason: FinishReason = "length"
        while len(ids) < sampling.max_new_tokens and finish_reason == "length":
            z_V = self.logits_VV[current] / sampling.temperature
            p_V = np.exp(z_V - z_V.max())
            p_V /= p_V.sum()
            current = int(random.choice(len(p_V), p=p_V))
            ids.append(current)
            logprobs.append(float(np.log(p_V[current])))
            finish_reason = "stop" if current in stops else "length"
        return Rollout(
            rollout_id=f"{prompt.prompt_id}#{draw}",
            prompt=prompt,
            token_ids=tuple(ids),
            finish_reason=finish_reason,
            logprobs=np.asarray(logprobs, dtype=np.float32),
            temperature=sampling.temperature,
            weights_version=self.version,
            draw=draw,
        )
