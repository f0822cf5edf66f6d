"""Engine against trainer on the same tokens: silent where they agree, loud where the weights differ."""

import asyncio
import copy

import numpy as np
import pytest
import torch

from bbopd.data.streams import each
from bbopd.errors import EngineError
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.hf import HFEngine
from bbopd.types import Prompt, Rollout, Sampling
from tests.tiny_models import tiny_gemma2, tiny_llama


def write(model, count=6, *, temperature=1.0, version=0, dtype=torch.float32, vocab_size=None) -> list[Rollout]:
    engine = HFEngine(model, eos_token_ids=(2,), pad_token_id=0, compute_dtype=dtype, vocab_size=vocab_size)
    random = np.random.default_rng(count)
    prompts = [Prompt(f"p{index}", tuple(random.integers(3, 320, 4 + index).tolist())) for index in range(count)]

    async def collect():
        await engine.load_weights([], version)
        return [rollout async for rollout in engine.generate(each(prompts), Sampling(20, temperature=temperature, seed=5))]

    return asyncio.run(collect())


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma2])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_the_same_weights_agree(make, temperature):
    model = make(seed=3)
    rollouts = write(model, temperature=temperature, version=7)
    figures = AgreementCheck(model, compute_dtype=torch.float32, tokens=60)(rollouts, 7)
    assert 60 <= figures["engine_compared_tokens"] < 80
    assert figures["engine_difference_mean"] <= figures["engine_difference_max"] < 1e-4


def test_padding_has_no_probability_for_either():
    model = tiny_llama(seed=3)
    rollouts = write(model, vocab_size=300)
    figures = AgreementCheck(model, compute_dtype=torch.float32, tokens=1000, vocab_size=300)(rollouts, 0)
    assert figures["engine_difference_max"] < 1e-4
    with pytest.raises(EngineError, match="differ from the trainer's by 0\\.0"):
        AgreementCheck(model, compute_dtype=torch.float32, tokens=1000)(rollouts, 0)


def test_bfloat16_agrees_within_its_own_limit():
    model = tiny_llama(seed=4)
    figures = AgreementCheck(model, compute_dtype=torch.bfloat16, tokens=1000)(write(model, dtype=torch.bfloat16), 0)
    assert 1e-5 < figures["engine_difference_mean"] < 0.05


def test_other_weights_are_an_error_that_names_both_numbers():
    model = tiny_llama(seed=5)
    rollouts = write(model)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.model.layers[1].mlp.down_proj.weight.mul_(1.5)
    loose = AgreementCheck(changed, compute_dtype=torch.float32, tokens=100, limit=1e6)(rollouts, 0)
    mean, largest = loose["engine_difference_mean"], loose["engine_difference_max"]
    assert mean > 0.001
    with pytest.raises(EngineError, match=f"{mean:.4g} nats on average and {largest:.4g} at most, with the limit 0.001"):
        AgreementCheck(changed, compute_dtype=torch.float32, tokens=100)(rollouts, 0)


def test_differences_are_those_of_an_exact_forward_pass():
    model = tiny_llama(seed=6)
    (rollout,) = write(model, 1)
    shifted = np.asarray(rollout.logprobs) + np.linspace(-0.2, 0.1, len(rollout), dtype=np.float32)
    found = AgreementCheck(model, compute_dtype=torch.float32, tokens=1, limit=1.0)(
        [Rollout("r", rollout.prompt, rollout.token_ids, logprobs=shifted)], 0
    )
    with torch.no_grad():
        rows = model.double()(input_ids=torch.tensor([rollout.all_ids])).logits[0].log_softmax(-1)
    exact = rows[len(rollout.prompt.token_ids) - 1 : -1].gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0].numpy()
    assert found["engine_difference_mean"] == pytest.approx(np.abs(shifted - exact).mean(), abs=1e-5)
    assert found["engine_difference_max"] == pytest.approx(np.abs(shifted - exact).max(), abs=1e-5)


def test_rollouts_of_older_weights_are_left_out():
    model = tiny_llama(seed=7)
    check = AgreementCheck(model, compute_dtype=torch.float32, tokens=1000)
    assert check(write(model, version=3), 4) == {}
    assert check([], 0) == {}


def test_logprobs_that_are_no_numbers_do_not_pass():
    model = tiny_llama(seed=8)
    (rollout,) = write(model, 1)
    broken = Rollout("r", rollout.prompt, rollout.token_ids, logprobs=np.full(len(rollout), np.nan, np.float32))
    with pytest.raises(EngineError, match="nan"):
        AgreementCheck(model, compute_dtype=torch.float32, tokens=1)([broken], 0)


def chaotic_llama():
    """A student as pruning leaves it: a deep one, sure of itself, whose logprobs follow every rounding."""
    model = tiny_llama(seed=9, layers=20, tied=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(12.0)
    return model


def test_a_student_that_magnifies_rounding_is_held_to_what_rounding_does_to_it():
    model = chaotic_llama()
    rollouts = write(copy.deepcopy(model).bfloat16(), 10, dtype=torch.bfloat16)  # as an engine does: residuals and logits too
    figures = AgreementCheck(model, compute_dtype=torch.bfloat16, tokens=1000)(rollouts, 0)
    assert 0.1 < figures["engine_difference_mean"] < 2 * figures["engine_rounding"]
    assert figures["engine_kl"] > 0
    with pytest.raises(EngineError, match=r"with the limit 0.1 \(rollouts.agreement.limit\)"):
        AgreementCheck(model, compute_dtype=torch.bfloat16, tokens=1000, limit=0.1)(rollouts, 0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[5].self_attn.o_proj.weight.mul_(-1.0)
    with pytest.raises(EngineError, match="2 times what rounding to bfloat16 makes of this student"):
        AgreementCheck(other, compute_dtype=torch.bfloat16, tokens=1000)(rollouts, 0)


def test_the_estimate_of_kl_is_k3():
    model = tiny_llama(seed=6)
    rollouts = write(model, 3)
    shift = np.random.default_rng(0).normal(0, 0.2, 200).astype(np.float32)
    moved = [
        Rollout(one.rollout_id, one.prompt, one.token_ids, logprobs=one.logprobs + shift[20 * place :][: len(one)], draw=one.draw)
        for place, one in enumerate(rollouts)
    ]
    figures = AgreementCheck(model, compute_dtype=torch.float32, tokens=1000, limit=9.0)(moved, 0)
    used = np.concatenate([shift[20 * place :][: len(one)] for place, one in enumerate(rollouts)]).astype(np.float64)
    assert figures["engine_kl"] == pytest.approx((np.exp(-used) - 1 + used).mean(), rel=1e-3)
