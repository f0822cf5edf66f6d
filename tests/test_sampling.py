"""The sampler against an exact inverse transform, with and without top-k and top-p."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bbopd.errors import ModelError
from bbopd.rollouts.sampling import draw_uniforms, sample_tokens
from bbopd.types import Sampling


@pytest.mark.parametrize("vocab_size", [3, 256, 257, 1000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampler_is_the_inverse_transform(vocab_size: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 3 * torch.randn(2000, vocab_size, generator=generator)
    uniforms = torch.rand(2000, generator=generator, dtype=torch.float64)
    p = (logits.double() / temperature).softmax(-1)
    cdf = p.cumsum(-1)
    ids, logprobs = sample_tokens(logits.clone(), uniforms, Sampling(1, temperature=temperature))
    upper = cdf.gather(1, ids[:, None])[:, 0]
    lower = upper - p.gather(1, ids[:, None])[:, 0]
    assert (uniforms <= upper + 2e-6).all()
    assert (uniforms >= lower - 2e-6).all()
    torch.testing.assert_close(logprobs.double(), p.gather(1, ids[:, None])[:, 0].log(), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 1.0), (8, 0.5), (1, 1.0), (5000, 0.9)])
def test_top_k_and_top_p_draw_from_the_renormalised_rest(top_k: int, top_p: float) -> None:
    z = np.random.default_rng(3).normal(size=300) * 2
    p = np.exp(z) / np.exp(z).sum()
    order = np.argsort(-p)[: top_k or None]
    within = p[order] / p[order].sum()
    kept = order[: int(np.searchsorted(np.cumsum(within), top_p - 1e-12)) + 1]
    q = np.zeros(300)
    q[kept] = p[kept] / p[kept].sum()

    count = 20_000
    uniforms = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    logits = torch.tensor(z, dtype=torch.float32).repeat(count, 1)
    ids, logprobs = sample_tokens(logits, uniforms, Sampling(1, top_k=top_k, top_p=top_p))
    assert set(ids.tolist()) <= set(kept.tolist())
    shares = np.bincount(ids.numpy(), minlength=300) / count
    np.testing.assert_allclose(shares, q, atol=1.5 / count)
    np.testing.assert_allclose(logprobs.numpy(), np.log(q[ids.numpy()]), atol=1e-5)


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.full((4, 600), -torch.inf)
    logits[:, [0, 255, 256, 599]] = 0.0
    uniforms = torch.tensor([0.0, 0.2499999, 0.5, 1.0 - 2**-53], dtype=torch.float64).clamp(max=1 - 1e-12)
    ids, logprobs = sample_tokens(logits, uniforms, Sampling(1))
    assert ids.tolist() == [0, 0, 256, 599]
    np.testing.assert_allclose(logprobs.numpy(), np.log(0.25), rtol=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("top_k", [0, 4])
def test_logits_that_are_not_finite_are_refused(value: float, top_k: int) -> None:
    logits = torch.zeros(2, 300)
    logits[1, 7] = value
    with pytest.raises(ModelError, match="NaN or infinite"):
        sample_tokens(logits, torch.tensor([0.5, 0.5]).double(), Sampling(1, top_k=top_k))


def test_streams_of_draws_differ_and_repeat() -> None:
    assert torch.equal(draw_uniforms(-1, 2, 50), draw_uniforms(-1, 2, 50))
    assert torch.equal(draw_uniforms(1, 2, 50), draw_uniforms(1, 2, 50))
    assert torch.equal(draw_uniforms(1, 2, 50)[:20], draw_uniforms(1, 2, 20))
    streams = torch.stack([draw_uniforms(seed, draw, 50) for seed in range(3) for draw in range(3)])
    assert len(torch.unique(streams)) == 9 * 50
