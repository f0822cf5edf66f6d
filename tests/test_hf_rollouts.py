"""The transformers engine against full forward passes without a cache."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from bbopd.errors import DataError, ModelError
from bbopd.rollouts.cache import RowCache
from bbopd.rollouts.hf import HFEngine
from bbopd.rollouts.requests import Requests
from bbopd.rollouts.sampling import draw_uniforms
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2
from tests.waiting import PATIENCE

EOS = 2


async def stream(prompts: Iterable[Prompt]) -> AsyncIterator[Prompt]:
    for prompt in prompts:
        yield prompt


def write(engine: HFEngine, prompts: list[Prompt], sampling: Sampling) -> list[Rollout]:
    async def collect() -> list[Rollout]:
        return [rollout async for rollout in engine.generate(stream(prompts), sampling)]

    return sorted(asyncio.run(collect()), key=lambda rollout: rollout.draw)


def make_prompts(lengths: list[int], seed: int = 0, vocab_size: int = 320) -> list[Prompt]:
    random = np.random.default_rng(seed)
    return [Prompt(f"p{i}", tuple(random.integers(3, vocab_size, length).tolist())) for i, length in enumerate(lengths)]


def engine_for(model: torch.nn.Module, eos: tuple[int, ...] = (EOS,), **options: object) -> HFEngine:
    return HFEngine(model, eos_token_ids=eos, pad_token_id=0, **options)


def exact_logprobs(model: torch.nn.Module, rollout: Rollout) -> np.ndarray:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([rollout.all_ids])).logits[0].double() / rollout.temperature
    rows = logits.log_softmax(-1)[len(rollout.prompt.token_ids) - 1 : -1]
    return rows[torch.arange(len(rollout)), torch.tensor(rollout.token_ids)].numpy()


# ---------------------------------------------------------------- the engine


def tiny_mistral(seed: int) -> MistralForCausalLM:
    """Sliding windows with SDPA and grouped queries."""
    config = tiny_llama().config.to_dict() | {"sliding_window": 5, "architectures": None, "model_type": "mistral"}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return MistralForCausalLM(MistralConfig(**config)).eval()


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gemma2, tiny_mistral])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_logprobs_are_those_of_a_full_forward_pass(make: type, temperature: float) -> None:
    model = make(seed=1)
    prompts = make_prompts([1, 9, 4, 4, 12, 2], seed=5)
    prompts += [prompts[1], prompts[4]]
    rollouts = write(engine_for(model, eos=tuple(range(2, 12))), prompts, Sampling(24, temperature=temperature, seed=4))
    assert [rollout.rollout_id for rollout in rollouts] == [f"{prompt.prompt_id}#{i}" for i, prompt in enumerate(prompts)]
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout, prompt in zip(rollouts, prompts, strict=True):
        assert rollout.prompt is prompt
        assert rollout.temperature == temperature
        assert rollout.logprobs is not None
        assert rollout.logprobs.dtype == np.float32
        np.testing.assert_allclose(rollout.logprobs, exact_logprobs(model, rollout), atol=2e-4)


def test_tokens_are_those_of_a_plain_loop_without_cache() -> None:
    model = tiny_llama(seed=2)
    prompts = make_prompts([7, 3, 3, 11], seed=6)
    sampling = Sampling(15, seed=9)
    for draw, rollout in enumerate(write(engine_for(model), prompts, sampling)):
        ids = list(prompts[draw].token_ids)
        for u in draw_uniforms(sampling.seed, draw, sampling.max_new_tokens).tolist():
            with torch.no_grad():
                p = model(input_ids=torch.tensor([ids])).logits[0, -1].double().softmax(-1)
            ids.append(int(torch.searchsorted(p.cumsum(-1), u)))
            if ids[-1] == EOS:
                break
        assert rollout.all_ids == tuple(ids)


def test_neighbours_in_the_batch_change_nothing() -> None:
    model = tiny_llama(seed=3)
    prompts = make_prompts([5, 20, 5, 1, 8, 13, 5], seed=7)
    sampling = Sampling(20, seed=1)
    together = write(engine_for(model, eos=tuple(range(2, 20))), prompts, sampling)
    assert len({len(rollout) for rollout in together}) > 2
    for options in ({"max_batch": 1}, {"max_batch": 3}, {"max_batch_tokens": 60}):
        apart = write(engine_for(model, eos=tuple(range(2, 20)), **options), prompts, sampling)
        assert [r.token_ids for r in apart] == [r.token_ids for r in together]
    assert [r.token_ids for r in write(engine_for(model), prompts, Sampling(20, seed=2))] != [r.token_ids for r in together]


def test_one_prompt_asked_twice_gets_two_answers() -> None:
    (prompt,) = make_prompts([6])
    first, second = write(engine_for(tiny_llama()), [prompt, prompt], Sampling(12))
    assert first.token_ids != second.token_ids


def test_an_answer_ends_with_its_stop_token_and_nothing_after() -> None:
    stops = set(range(2, 60))
    rollouts = write(
        engine_for(tiny_llama(), eos=tuple(range(2, 30))), make_prompts([4] * 12), Sampling(10, stop_token_ids=tuple(range(30, 60)))
    )
    assert {rollout.finish_reason for rollout in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        assert not stops & set(rollout.token_ids[:-1])
        assert (rollout.token_ids[-1] in stops) == (rollout.finish_reason == "stop")
        assert len(rollout) == 10 or rollout.finish_reason == "stop"


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    implementation = model.config._attn_implementation
    write(engine_for(model), make_prompts([4, 6]), Sampling(3))
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == implementation
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(ModelError, match="diverged"):
        write(engine_for(model), make_prompts([4, 6]), Sampling(3))
    assert [module.training for module in model.modules()] == modes
    loss = model(input_ids=torch.tensor([[3, 4, 5]])).logits.sum()
    loss.backward()


def test_bfloat16_compute_keeps_the_weights() -> None:
    model = tiny_llama()
    rollouts = write(engine_for(model, compute_dtype=torch.bfloat16), make_prompts([5, 8]), Sampling(10))
    assert next(model.parameters()).dtype == torch.float32
    for rollout in rollouts:
        np.testing.assert_allclose(rollout.logprobs, exact_logprobs(model, rollout), atol=0.3)


async def test_rollouts_arrive_while_others_are_written_and_closing_stops_the_thread() -> None:
    engine = engine_for(tiny_llama(max_positions=4096), eos=tuple(range(3, 40)))
    before = threading.active_count()
    rollouts = engine.generate(stream(make_prompts([4] * 16)), Sampling(3000))
    first = await anext(rollouts)
    assert first.finish_reason == "stop"
    await rollouts.aclose()  # type: ignore[attr-defined]
    assert not engine._in_use.locked()
    assert threading.active_count() <= before + 1  # the executor's own idle thread
    assert not engine.model.training


async def test_cancelling_stops_the_thread_and_weights_can_change_between_rollouts() -> None:
    engine = engine_for(tiny_llama(max_positions=4096), eos=())
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.2):
            await anext(engine.generate(stream(make_prompts([4] * 16)), Sampling(3000)))
    assert not engine._in_use.locked()
    async for rollout in engine.generate(stream(make_prompts([4, 5])), Sampling(3)):
        assert rollout.weights_version == 0
        await asyncio.wait_for(engine.load_weights([], 1), timeout=PATIENCE)
    assert engine.version == 1


async def test_prompts_are_checked_before_anything_is_written() -> None:
    engine = engine_for(tiny_llama(max_positions=32))
    for prompt, message in (
        (Prompt("long", tuple(range(3, 28))), "prompt long has 25 tokens.*8.*32"),
        (Prompt("none", ()), "none is empty"),
    ):
        with pytest.raises(DataError, match=message):
            await anext(engine.generate(stream([prompt]), Sampling(8)))
    assert [
        len(r) async for r in engine_for(engine.model, eos=()).generate(stream([Prompt("fits", tuple(range(3, 27)))]), Sampling(8))
    ] == [8]
    with pytest.raises(ValueError, match="must be positive"):
        await anext(engine.generate(stream([]), Sampling(8, temperature=0.0)))


# ---------------------------------------------------------------- rows that leave and rows that join


def watch_steps(model: torch.nn.Module) -> list[tuple[int, int, int]]:
    """Rows, columns read and the column written of every pass from now on that writes a token."""
    steps: list[tuple[int, int, int]] = []

    def note(module: torch.nn.Module, args: tuple[object, ...], options: dict[str, Any]) -> None:
        cache = options.get("past_key_values")
        if isinstance(cache, RowCache) and cache.targets is None:  # no prefill
            steps.append((options["input_ids"].shape[0], cache.column + 1 - cache.first, cache.column))

    model.register_forward_pre_hook(note, with_kwargs=True)
    return steps


@pytest.mark.parametrize(("make", "new_tokens"), [(tiny_llama, 80), (tiny_gemma2, 24), (tiny_mistral, 80)])
def test_waiting_prompts_take_the_rows_that_get_free(make: type, new_tokens: int) -> None:
    model = make(seed=1)
    prompts = make_prompts(np.random.default_rng(0).integers(1, 20, 28).tolist(), seed=5)
    eos, sampling = tuple(range(2, 8)), Sampling(new_tokens, seed=4)
    together = write(engine_for(model, eos=eos), prompts, sampling)
    assert {rollout.finish_reason for rollout in together} == {"stop", "length"}
    steps = watch_steps(model)
    joined = write(engine_for(model, eos=eos, max_batch=6), prompts, sampling)
    assert [rollout.token_ids for rollout in joined] == [rollout.token_ids for rollout in together]
    for rollout in joined[::3]:
        np.testing.assert_allclose(rollout.logprobs, exact_logprobs(model, rollout), atol=2e-4)
    tokens = sum(map(len, joined))
    assert sum(rows for rows, _, _ in steps) == tokens
    assert len(steps) < 1.5 * max(tokens / 6, new_tokens)  # a batch that is refilled only when empty takes about twice as many
    assert max(columns for _, columns, _ in steps) <= 19 + new_tokens  # what all active rows have left behind is not read


def test_rows_move_where_there_are_no_columns_left_or_a_prompt_needs_more() -> None:
    model = tiny_llama(seed=1)
    lengths = np.random.default_rng(1).choice([1] * 11 + [30], 160)
    prompts = make_prompts([30, 1, *lengths.tolist()], seed=1)
    eos, sampling = tuple(range(2, 40)), Sampling(20, seed=1)
    together = write(engine_for(model, eos=eos, max_batch=200), prompts, sampling)
    steps = watch_steps(model)
    assert [rollout.token_ids for rollout in write(engine_for(model, eos=eos, max_batch=4), prompts, sampling)] == [
        rollout.token_ids for rollout in together
    ]
    changes = np.diff([column for _, _, column in steps])
    assert (changes < 1).any()  # back, to the beginning
    assert (changes > 1).any()  # on, for a prompt longer than what the others have written


def test_a_longer_prompt_waits_for_the_next_batch() -> None:
    model = tiny_llama(seed=1)
    prompts = make_prompts([3, 4, 30, 2, 5, 31], seed=5)
    eos, sampling = tuple(range(2, 60)), Sampling(12, seed=1)
    alone = write(engine_for(model, eos=eos, max_batch=1), prompts, sampling)
    steps = watch_steps(model)
    joined = write(engine_for(model, eos=eos, max_batch=2), prompts, sampling)
    assert [rollout.token_ids for rollout in joined] == [rollout.token_ids for rollout in alone]
    assert max(columns for _, columns, _ in steps) > 30


async def test_which_rows_share_a_batch_does_not_depend_on_who_is_faster() -> None:
    model = tiny_llama(seed=1)
    prompts = make_prompts([5, 20, 5, 1, 8, 13, 5, 9, 2, 7], seed=7)
    steps = watch_steps(model)

    async def hesitant(pauses: list[float]) -> AsyncIterator[Prompt]:
        for prompt, pause in zip(prompts, pauses, strict=True):
            await asyncio.sleep(pause)
            yield prompt

    seen = []
    for pauses in ([0.0] * 10, [0.03, 0.0] * 5, [0.0] * 6 + [0.05] * 4):
        engine = engine_for(model, eos=tuple(range(2, 20)), max_batch=3)
        rollouts = [rollout async for rollout in engine.generate(hesitant(pauses), Sampling(20, seed=1))]
        seen.append(([rollout.rollout_id for rollout in rollouts], list(steps)))
        steps.clear()
    assert seen[0] == seen[1] == seen[2]
    assert len(seen[0][0]) == 10


async def test_a_stream_that_fails_ends_the_writing() -> None:
    async def failing() -> AsyncIterator[Prompt]:
        for prompt in make_prompts([4] * 3):
            yield prompt
        await asyncio.sleep(0.05)
        raise DataError("no more")

    engine = engine_for(tiny_llama(max_positions=4096), eos=(), max_batch=2)
    with pytest.raises(DataError, match="no more"):
        async for _ in engine.generate(failing(), Sampling(3000)):
            pass
    assert not engine._in_use.locked()


async def test_weights_come_in_between_rollouts_of_a_long_stream() -> None:
    engine = engine_for(tiny_llama(seed=1), eos=tuple(range(2, 40)), max_batch=3)
    versions = []

    async def endless() -> AsyncIterator[Prompt]:
        while True:
            for prompt in make_prompts([4, 5, 6, 3]):
                yield prompt

    rollouts = engine.generate(endless(), Sampling(12))
    for push in range(1, 4):
        await asyncio.wait_for(engine.load_weights([], push), timeout=PATIENCE)
        while not versions or versions[-1] < push:
            versions.append((await anext(rollouts)).weights_version)
    await rollouts.aclose()  # type: ignore[attr-defined]
    assert versions == sorted(versions)


async def test_a_stream_that_waits_for_answers_is_served() -> None:
    answered = asyncio.Event()

    async def reluctant() -> AsyncIterator[Prompt]:
        for prompt in make_prompts([4, 6, 5]):
            yield prompt
            await answered.wait()

    requests = Requests(8, patience=0.05)
    feeding = asyncio.create_task(requests.feed(reluctant(), lambda prompt: None))
    assert [request.draw for request in await asyncio.to_thread(requests.take_first, 8)] == [0]  # and not eight
    answered.set()
    await feeding
    assert [request.draw for request in requests.take(8)] == [1, 2]
    assert requests.is_over
    assert requests.take_first(8) == []


async def test_no_prompts_no_rollouts() -> None:
    assert [r async for r in engine_for(tiny_llama()).generate(stream([]), Sampling(4))] == []


async def test_weights_are_copied_in_and_versioned() -> None:
    engine, other = engine_for(tiny_llama(seed=0)), tiny_llama(seed=8)
    assert isinstance(engine, RolloutEngine)
    addresses = {name: p.data_ptr() for name, p in engine.model.named_parameters()}
    await engine.load_weights(other.named_parameters(), 3)
    assert {name: p.data_ptr() for name, p in engine.model.named_parameters()} == addresses
    (prompt,) = make_prompts([5])
    sampling = Sampling(8, seed=1)
    (mine,) = [r async for r in engine.generate(stream([prompt]), sampling)]
    (theirs,) = [r async for r in engine_for(other).generate(stream([prompt]), sampling)]
    assert mine.token_ids == theirs.token_ids
    assert (mine.weights_version, theirs.weights_version) == (3, 0)
    await engine.load_weights(engine.model.named_parameters(), 4)
    assert engine.version == 4
    with pytest.raises(ModelError, match="nowhere"):
        await engine.load_weights([("nowhere", torch.zeros(1))], 5)
    with pytest.raises(ModelError, match="shape"):
        await engine.load_weights([("model.norm.weight", torch.zeros(1))], 5)
    assert engine.version == 4
