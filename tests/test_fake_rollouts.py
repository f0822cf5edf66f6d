"""The fake engine keeps the promises of the real ones, on a table whose probabilities are known."""

from __future__ import annotations

from collections.abc import AsyncIterator

import numpy as np
import pytest

from bbopd.rollouts.fake import FakeEngine
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling


async def stream(count: int) -> AsyncIterator[Prompt]:
    for i in range(count):
        yield Prompt(f"p{i}", (i % 7 + 1, i % 5 + 1))


async def collect(engine: FakeEngine, count: int, sampling: Sampling) -> list[Rollout]:
    return [rollout async for rollout in engine.generate(stream(count), sampling)]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
async def test_logprobs_are_those_of_the_table(temperature: float) -> None:
    engine = FakeEngine(16, eos_token_id=0, seed=3)
    assert isinstance(engine, RolloutEngine)
    rollouts = await collect(engine, 40, Sampling(12, temperature=temperature, seed=5))
    z = engine.logits_VV / temperature
    table = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for draw, rollout in enumerate(rollouts):
        assert rollout.rollout_id == f"p{draw}#{draw}"
        before = (rollout.prompt.token_ids[-1], *rollout.token_ids[:-1])
        np.testing.assert_allclose(rollout.logprobs, table[list(before), list(rollout.token_ids)], atol=1e-5)
        assert (rollout.token_ids[-1] == 0) == (rollout.finish_reason == "stop")
        assert 0 not in rollout.token_ids[:-1]
        assert len(rollout) == 12 or rollout.finish_reason == "stop"


async def test_tokens_follow_the_table() -> None:
    engine = FakeEngine(6, eos_token_id=5, seed=1)
    prompts = [Prompt("p", (2,))] * 4000

    async def same() -> AsyncIterator[Prompt]:
        for prompt in prompts:
            yield prompt

    first = [rollout.token_ids[0] async for rollout in engine.generate(same(), Sampling(1))]
    p = np.exp(engine.logits_VV[2])
    np.testing.assert_allclose(np.bincount(first, minlength=6) / len(first), p / p.sum(), atol=0.03)


async def test_seed_and_draw_decide() -> None:
    runs = [[r.token_ids for r in await collect(FakeEngine(50, eos_token_id=0), 8, Sampling(9, seed=seed))] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


async def test_failure_and_version() -> None:
    engine = FakeEngine(8, eos_token_id=0, fail_after=3, delay=0.001)
    await engine.load_weights([], 7)
    rollouts = engine.generate(stream(5), Sampling(2))
    assert [(await anext(rollouts)).weights_version for _ in range(3)] == [7, 7, 7]
    with pytest.raises(RuntimeError, match="after 3"):
        await anext(rollouts)
    with pytest.raises(ValueError, match="whole distribution"):
        await collect(engine, 1, Sampling(2, top_p=0.9))
