"""The real vLLM engine, in its own process, against transformers with the same weights (`make test-vllm`)."""

import asyncio
import copy
import importlib.util
import os
import signal
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import torch

from bbopd.cli.demo import KEPT_LAYERS, find_model
from bbopd.config import InitConfig
from bbopd.data.streams import each
from bbopd.errors import DataError, EngineError, ModelError
from bbopd.modeling import load_model, load_tokenizer
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.hf import HFEngine
from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling
from tests.tiny_models import tiny_llama, tiny_qwen2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
    pytest.mark.asyncio(loop_scope="module"),
]

GREEDY = Sampling(max_new_tokens=12, top_k=1)
TEXTS = (
    "The with statement is used to wrap the execution of a block.",
    "Water boils at a lower temperature on a mountain because",
    "The capital of France is",
    "def add(a, b):\n    return",
    "Once upon a time there was a",
    "In 1969 the first people",
    "A list comprehension in Python",
    "The largest planet of the solar system",
)


async def write(engine: RolloutEngine, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
    return sorted([rollout async for rollout in engine.generate(each(prompts), sampling)], key=lambda rollout: rollout.draw)


def ids(rollouts: list[Rollout]) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in rollouts]


def changed(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """A copy with every weight moved a little, so that it writes something else."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.2 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return other


# ---------------------------------------------------------------- the demo's student: from GGUF, pruned, a tied head


@pytest.fixture(scope="module")
def smollm() -> torch.nn.Module:
    return load_model(find_model(), keep_layers=InitConfig(keep_layers=KEPT_LAYERS).keep_layers)


@pytest.fixture(scope="module")
def smollm_prompts() -> list[Prompt]:
    tokenizer = load_tokenizer(find_model())
    return [Prompt(f"p{index}", tuple(tokenizer(text)["input_ids"])) for index, text in enumerate(TEXTS)]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def smollm_engine(smollm, tmp_path_factory) -> AsyncIterator[VLLMEngine]:
    options = VLLMOptions(max_sequence_tokens=128, max_batch=8)
    engine = await VLLMEngine.start(smollm, options, eos_token_ids=(2,), folder=tmp_path_factory.mktemp("smollm"))
    await engine.load_weights(smollm.named_parameters(), 1)
    yield engine
    await engine.close()


async def test_greedy_tokens_are_those_of_transformers(smollm_engine, smollm, smollm_prompts):
    assert isinstance(smollm_engine, RolloutEngine)
    mine = await write(smollm_engine, smollm_prompts, GREEDY)
    theirs = await write(HFEngine(smollm, eos_token_ids=(2,), pad_token_id=0), smollm_prompts, GREEDY)
    assert sum(a == b for a, b in zip(ids(mine), ids(theirs), strict=True)) >= len(TEXTS) - 1  # a tie may fall either way
    assert {rollout.weights_version for rollout in mine} == {1}
    assert [rollout.rollout_id for rollout in mine] == [f"p{index}#{index}" for index in range(len(TEXTS))]


@pytest.mark.parametrize("temperature", [1.0, 1.6])
async def test_logprobs_are_the_trainers(smollm_engine, smollm, smollm_prompts, temperature):
    rollouts = await write(smollm_engine, smollm_prompts[:4], Sampling(12, temperature=temperature, seed=3))
    figures = AgreementCheck(smollm, compute_dtype=torch.float32, tokens=1000)(rollouts, 1)
    assert figures["engine_compared_tokens"] == sum(map(len, rollouts)) > 30
    assert figures["engine_difference_max"] < 5e-4


async def test_a_push_changes_what_is_written_and_pushing_back_restores_it(smollm_engine, smollm, smollm_prompts):
    before = await write(smollm_engine, smollm_prompts, GREEDY)
    other = changed(smollm, seed=1)
    await smollm_engine.load_weights(other.named_parameters(), 2)
    pushed = await write(smollm_engine, smollm_prompts, Sampling(12, seed=5))
    assert {rollout.weights_version for rollout in pushed} == {2}
    assert AgreementCheck(other, compute_dtype=torch.float32, tokens=1000)(pushed, 2)["engine_difference_max"] < 2e-3
    with pytest.raises(EngineError, match="nats on average"):
        AgreementCheck(smollm, compute_dtype=torch.float32, tokens=1000)(pushed, 2)
    await smollm_engine.load_weights(smollm.named_parameters(), 3)
    assert ids(await write(smollm_engine, smollm_prompts, GREEDY)) == ids(before)


# ---------------------------------------------------------------- a tiny one, for everything that needs no sense


def tiny_prompts(lengths: list[int]) -> list[Prompt]:
    random = np.random.default_rng(1)
    return [Prompt(f"t{index}", tuple(random.integers(3, 320, length).tolist())) for index, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def tiny() -> torch.nn.Module:
    return tiny_llama(hidden=128, seed=1, tied=False, max_positions=4096)  # heads 32 wide: no kernel of vLLM's takes less


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def tiny_engine(tiny, tmp_path_factory) -> AsyncIterator[VLLMEngine]:
    options = VLLMOptions(max_sequence_tokens=2048, max_batch=8)
    engine = await VLLMEngine.start(tiny, options, eos_token_ids=(2, 3), folder=tmp_path_factory.mktemp("tiny"))
    with pytest.raises(EngineError, match="no weights yet"):
        await write(engine, tiny_prompts([3]), GREEDY)
    await engine.load_weights(tiny.named_parameters(), 7)
    yield engine
    await engine.close()


async def test_seeds_repeat_and_draws_differ(tiny_engine):
    (prompt,) = tiny_prompts([5])
    first = await write(tiny_engine, [prompt] * 4, Sampling(12, seed=9))
    assert ids(await write(tiny_engine, [prompt] * 4, Sampling(12, seed=9))) == ids(first)
    assert len(set(ids(first))) == 4
    assert ids(await write(tiny_engine, [prompt] * 4, Sampling(12, seed=10))) != ids(first)


async def test_more_prompts_than_places_and_reasons_for_ending(tiny_engine, tiny):
    stops = tuple(range(10, 60))
    prompts = tiny_prompts([1 + index % 9 for index in range(40)])
    rollouts = await write(tiny_engine, prompts, Sampling(8, seed=2, stop_token_ids=stops))
    assert [rollout.prompt for rollout in rollouts] == prompts
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ends = {2, 3, *stops}
        assert not ends & set(rollout.token_ids[:-1])
        assert (rollout.token_ids[-1] in ends) == (rollout.finish_reason == "stop")
        assert len(rollout) == 8 or rollout.finish_reason == "stop"
    figures = AgreementCheck(tiny, compute_dtype=torch.float32, tokens=10_000)(rollouts, 7)
    assert figures["engine_difference_max"] < 1e-3


async def test_prompts_that_no_single_step_can_read(tiny_engine, tiny):
    rollouts = await write(tiny_engine, tiny_prompts([1500, 9, 1400, 1300, 700, 5]), Sampling(6, seed=3))
    assert len(rollouts) == 6
    figures = AgreementCheck(tiny, compute_dtype=torch.float32, tokens=10_000)(rollouts, 7)
    assert figures["engine_difference_max"] < 1e-3


async def test_top_k_and_top_p_give_the_logprobs_drawn_from(tiny_engine, tiny):
    sampling = Sampling(10, temperature=1.3, top_k=20, top_p=0.8, seed=4)
    for rollout in await write(tiny_engine, tiny_prompts([4, 9]), sampling):
        with torch.no_grad():
            logits = tiny(input_ids=torch.tensor([rollout.all_ids])).logits[0].double() / 1.3
        for token, logprob, z in zip(rollout.token_ids, rollout.logprobs, logits[len(rollout.prompt.token_ids) - 1 : -1], strict=True):
            best, where = z.topk(20)
            p = best.softmax(-1)
            kept = p.cumsum(-1) - p < 0.8
            q = torch.where(kept, p, 0.0) / p[kept].sum()
            assert np.exp(logprob) == pytest.approx(float(q[where == token].sum()), rel=1e-3)


async def test_prompts_that_cannot_be_answered_are_refused_by_name(tiny_engine):
    with pytest.raises(DataError, match=r"prompt t0 has 2041 tokens.*8.*2048"):
        await write(tiny_engine, tiny_prompts([2041]), Sampling(8))
    with pytest.raises(DataError, match="empty"):
        await write(tiny_engine, [Prompt("none", ())], Sampling(8))
    with pytest.raises(ValueError, match="must be positive"):
        await write(tiny_engine, [], Sampling(8, temperature=0.0))
    assert await write(tiny_engine, [], Sampling(8)) == []


async def test_closing_and_cancelling_abort_what_is_being_written(tiny_engine, tiny):
    long = Sampling(2000, stop_token_ids=tuple(range(4, 12)))
    rollouts = tiny_engine.generate(each(tiny_prompts([4] * 16)), long)
    first = await anext(rollouts)
    assert first.finish_reason == "stop"
    await rollouts.aclose()
    endless = asyncio.ensure_future(write(tiny_engine, tiny_prompts([4] * 16), Sampling(2000, top_k=1)))
    await asyncio.sleep(0.3)
    endless.cancel()
    await asyncio.wait({endless})
    # a push waits for what is being written: it would take minutes, were it not aborted
    async with asyncio.timeout(20):
        await tiny_engine.load_weights(tiny.named_parameters(), 7)
        assert len(await write(tiny_engine, tiny_prompts([3, 3]), Sampling(4))) == 2


async def test_a_push_waits_for_rollouts_and_holds_new_ones_back(tiny_engine, tiny):
    other = changed(tiny, seed=2)
    old = asyncio.ensure_future(write(tiny_engine, tiny_prompts([4] * 4), Sampling(60, seed=1)))
    await asyncio.sleep(0.2)
    push = asyncio.ensure_future(tiny_engine.load_weights(other.named_parameters(), 8))
    await asyncio.sleep(0)
    new = asyncio.ensure_future(write(tiny_engine, tiny_prompts([4] * 4), Sampling(20, seed=1)))
    async with asyncio.timeout(60):
        await asyncio.gather(old, push, new)
    assert {rollout.weights_version for rollout in old.result()} == {7}
    assert {rollout.weights_version for rollout in new.result()} == {8}
    AgreementCheck(tiny, compute_dtype=torch.float32, tokens=1000)(old.result(), 7)
    AgreementCheck(other, compute_dtype=torch.float32, tokens=1000)(new.result(), 8)
    await tiny_engine.load_weights(tiny.named_parameters(), 7)


# ---------------------------------------------------------------- failing: an engine of its own each, biases and bfloat16 on the way


async def test_bfloat16_biases_and_weights_that_do_not_fit(tmp_path):
    model = tiny_qwen2(hidden=128)
    engine = await VLLMEngine.start(model, VLLMOptions(256, dtype=torch.bfloat16, max_batch=4), eos_token_ids=(2,), folder=tmp_path)
    try:
        await engine.load_weights(model.named_parameters(), 0)
        rollouts = await write(engine, tiny_prompts([4, 8, 3, 5]), Sampling(40, seed=1))
        figures = AgreementCheck(model, compute_dtype=torch.bfloat16, tokens=1000)(rollouts, 0)
        assert 1e-4 < figures["engine_difference_mean"] < 0.1  # logits of about 8, rounded to bfloat16 by the engine
        with pytest.raises(ModelError, match="nowhere"):
            await engine.load_weights([("model.nowhere.weight", torch.zeros(4))], 1)
        with pytest.raises(EngineError, match=r"cut off.*nowhere"):
            await write(engine, tiny_prompts([4]), Sampling(4))
    finally:
        await engine.close()


async def test_a_parameter_left_out_is_refused(tmp_path, tiny):
    engine = await VLLMEngine.start(tiny, VLLMOptions(256, max_batch=4), eos_token_ids=(2,), folder=tmp_path)
    try:
        with pytest.raises(ModelError, match=r"left out 1 parameters.*model\.norm\.weight"):
            await engine.load_weights([(n, p) for n, p in tiny.named_parameters() if n != "model.norm.weight"], 0)
    finally:
        await engine.close()


@pytest.mark.parametrize(("number", "message"), [(signal.SIGKILL, "SIGKILL"), (signal.SIGSTOP, "has not been heard of for 3 s")])
async def test_an_engine_that_dies_or_hangs_is_an_error(number, message, tmp_path, tiny):
    engine = await VLLMEngine.start(tiny, VLLMOptions(2048, max_batch=4), eos_token_ids=(), folder=tmp_path)
    try:
        await engine.load_weights(tiny.named_parameters(), 0)
        engine._client._timeout = 3.0
        writing = asyncio.ensure_future(write(engine, tiny_prompts([4] * 4), Sampling(2000)))
        await asyncio.sleep(0.5)
        os.kill(engine.pid, number)
        with pytest.raises(EngineError, match=message):
            async with asyncio.timeout(30):
                await writing
        with pytest.raises(EngineError, match=message):
            await engine.load_weights(tiny.named_parameters(), 1)
    finally:
        await engine.close()
