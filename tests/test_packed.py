"""Packing must be invisible: every value and gradient as if each sequence had been run alone."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from bbopd.errors import ModelError
from bbopd.modeling import packed, packed_attention, packed_hidden
from bbopd.modeling.layers import decoder
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2

LENGTHS = [7, 1, 12, 12, 12, 7, 20]  # neighbours of one length are attended to together


def tiny_mistral():
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=320,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            sliding_window=5,
        )
    ).eval()


def tiny_gpt2():
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=320, n_embd=32, n_head=4, n_layer=2, n_positions=64, bos_token_id=0, eos_token_id=2)
    ).eval()


def tiny_gpt_oss():
    torch.manual_seed(0)
    config = GptOssConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=0,
        eos_token_id=2,
    )
    return GptOssForCausalLM(config).eval()


def tiny_mamba():
    torch.manual_seed(0)
    return MambaForCausalLM(
        MambaConfig(vocab_size=320, hidden_size=32, num_hidden_layers=2, state_size=4, pad_token_id=0, eos_token_id=2)
    ).eval()


MODELS = {
    "llama": (tiny_llama, True),
    "qwen2": (tiny_qwen2, True),
    "gemma2": (tiny_gemma2, True),  # soft-capped attention, sliding windows shorter than the sequences
    "mistral": (tiny_mistral, True),  # a sliding window in every layer
    "gpt2": (tiny_gpt2, True),  # learned positions
    "gpt_oss": (tiny_gpt_oss, False),  # attention sinks
    "mamba": (tiny_mamba, False),  # a state that runs from left to right, over any boundary
}


def random_sequences(lengths: list[int], seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 320, (sum(lengths),), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    return ids, positions, torch.tensor([0, *lengths]).cumsum(0).int()


def one_by_one(model, ids, lengths):
    return torch.cat([decoder(model)(input_ids=part[None]).last_hidden_state[0] for part in ids.split(lengths)])


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, expected):
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()) + 1e-9, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_one_by_one(name):
    make, is_packed = MODELS[name]
    model = make()
    ids, positions, boundaries = random_sequences(LENGTHS)
    found = packed_hidden(model, ids, positions, boundaries)
    expected = one_by_one(model, ids, LENGTHS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    cotangent = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    assert_same_gradients(gradients(model, (found * cotangent).sum()), gradients(model, (expected * cotangent).sum()))
    assert packed._packable[decoder(model)] is is_packed


def test_a_changed_token_reaches_its_own_later_tokens_only():
    model = tiny_llama()
    ids, positions, boundaries = random_sequences(LENGTHS)
    before = packed_hidden(model, ids, positions, boundaries)
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % 320  # third token of the third sequence, rows 8 to 19
    differs = (packed_hidden(model, changed, positions, boundaries) - before).abs().amax(dim=-1) > 0
    assert differs.nonzero().flatten().tolist() == list(range(10, 20))


def test_packing_in_training_mode_keeps_dropout_modes_and_generation():
    model = tiny_llama()
    prompt = torch.tensor([[5, 6, 7]])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    model.train()
    model.model.norm.eval()
    packed_hidden(model, *random_sequences([3, 4]))
    assert model.training
    assert not model.model.norm.training
    assert model.config._attn_implementation == "sdpa"
    model.eval()
    assert torch.equal(model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False), expected)


def test_activation_checkpointing_gives_the_same_gradients():
    model = tiny_llama()
    ids, positions, boundaries = random_sequences(LENGTHS)
    expected = gradients(model, packed_hidden(model, ids, positions, boundaries).square().sum())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    with packed_attention(model):
        found = gradients(model, packed_hidden(model, ids, positions, boundaries).square().sum())
    assert_same_gradients(found, expected)


def test_activation_checkpointing_outside_packed_attention_is_refused():
    model = tiny_llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ModelError, match="inside packed_attention"):
        packed_hidden(model, *random_sequences([3, 4]))


def test_bfloat16_autocast_is_close():
    model = tiny_llama()
    sequences = random_sequences(LENGTHS)
    expected = packed_hidden(model, *sequences)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_hidden(model, *sequences)
    error = (found.float() - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.05


def test_bfloat16_weights_are_packed_too():
    model = tiny_llama().bfloat16()
    ids, positions, boundaries = random_sequences(LENGTHS)
    found = packed_hidden(model, ids, positions, boundaries).float()
    expected = one_by_one(model, ids, LENGTHS).float()
    assert packed._packable[decoder(model)]
    assert (found - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("build", [tiny_llama, tiny_qwen2, tiny_gemma2, tiny_mistral])
def test_what_several_sequences_begin_with_is_run_once_and_nothing_else_changes(build):
    model = build()
    assert packed.can_share_prefixes(model)
    prompts, tails = [9, 4], [[6, 11, 1], [8, 3]]  # some longer than the sliding windows of 5
    ids = torch.randint(0, 320, (sum(prompts) + sum(map(sum, tails)) + 7,), generator=torch.Generator().manual_seed(1))
    pieces = list(ids.split([7, 9, 6, 11, 1, 4, 8, 3]))  # one that shares nothing, then each prompt with what goes on from it
    prefixes = [None, None, 1, 1, 1, None, 5, 5]
    starts = [0 if prefix is None else len(pieces[prefix]) for prefix in prefixes]
    positions = torch.cat([torch.arange(start, start + len(piece)) for start, piece in zip(starts, pieces, strict=True)])
    boundaries = torch.tensor([0, *map(len, pieces)]).cumsum(0)
    with torch.no_grad():
        shared = packed_hidden(model, ids, positions, boundaries, prefixes).split([len(piece) for piece in pieces])
        for number, (piece, prefix) in enumerate(zip(pieces, prefixes, strict=True)):
            whole = piece if prefix is None else torch.cat((pieces[prefix], piece))
            alone = packed_hidden(model, whole, torch.arange(len(whole)), torch.tensor([0, len(whole)]))[-len(piece) :]
            torch.testing.assert_close(shared[number], alone, atol=1e-5, rtol=1e-5)


def test_models_that_are_padded_share_nothing():
    assert not packed.can_share_prefixes(tiny_gpt_oss())
