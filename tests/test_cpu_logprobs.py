"""The C++ engine of `linear_logprobs`: every instruction set against float64, exact tails, ties, masked logits.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bbopd import linear_logprobs
from bbopd.cpu_tensors import LEVELS, cpu_level
from bbopd.types import TokenLogprobs
from tests.distill_oracle import draw

AVAILABLE = LEVELS[: LEVELS.index(cpu_level()) + 1]
FIELDS = ("logsumexp", "sampled", "topk_logprobs", "log_tail", "candidates", "candidates_log_tail")


def some_ids(N: int, V: int, M: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    candidate_ids = torch.stack([torch.randperm(V, generator=generator)[:M] for _ in range(N)])
    candidate_ids[torch.rand(N, M, generator=generator) < 0.2] = -1
    return torch.randint(0, V, (N,), generator=generator), candidate_ids


def assert_near(found: TokenLogprobs, truth: TokenLogprobs, tolerance: float = 2e-5) -> None:
    for name in FIELDS:
        ours, theirs = getattr(found, name), getattr(truth, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == torch.float32
            assert torch.equal(ours.isinf(), theirs.isinf()), name
            close = (ours - theirs).abs() <= tolerance * (1 + theirs.abs())
            assert (close | ours.isinf()).all(), (name, (ours - theirs).abs().nan_to_num(0).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", AVAILABLE)
def test_every_level_matches_float64(level: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles in each direction, sizes that fill none; bias, scale, softcap, padding; each request alone, and all at once."""
    monkeypatch.setenv("BBOPD_CPU_LEVEL", level)
    N, V, used, D = 131, 1303, 1291, 37
    hidden, weight, generator = draw(N, V, D, dtype, spread=3.0)
    bias = torch.randn(V, generator=generator).to(dtype)
    token_ids, candidate_ids = some_ids(N, used, 13, generator)
    for temperature, softcap in ((1.0, None), (2.0, 9.0), (0.7, None)):
        for asked in (
            {"top_k": 40},
            {"candidate_ids": candidate_ids},
            {"token_ids": token_ids, "top_k": 40, "candidate_ids": candidate_ids},
        ):
            how = {"temperature": temperature, "logit_softcap": softcap, "logit_scale": 1.3, "vocab_size": used, **asked}
            truth = linear_logprobs(hidden.double(), weight.double(), bias=bias.double(), impl="reference", **how)
            found = linear_logprobs(hidden, weight, bias=bias, impl="cpu", **how)
            assert_near(found, truth)
            if "top_k" in asked:
                # neighbours that float32 cannot tell apart may change places
                at = truth.topk_logprobs.diff(dim=1).abs() < 1e-4
                sure = ~(torch.nn.functional.pad(at, (1, 0)) | torch.nn.functional.pad(at, (0, 1), value=True))
                assert torch.equal(found.topk_ids[sure], truth.topk_ids[sure])


@pytest.mark.parametrize(("N", "V", "D", "K"), [(1, 1, 1, 1), (2, 7, 3, 7), (1, 50257, 8, 64), (3, 4099, 4, 1024), (700, 300, 5, 299)])
def test_odd_sizes(N: int, V: int, D: int, K: int) -> None:
    hidden, weight, generator = draw(N, V, D, torch.float32, spread=2.0)
    token_ids, candidate_ids = some_ids(N, V, min(V, 70), generator)
    asked = {"token_ids": token_ids, "candidate_ids": candidate_ids, "top_k": K}
    assert_near(linear_logprobs(hidden, weight, impl="cpu", **asked), linear_logprobs(hidden.double(), weight.double(), **asked))


@pytest.mark.parametrize("offset", [0.0, 100.0, -3000.0])
def test_a_small_tail_is_exact(offset: float) -> None:
    """Mass of 1e-30 outside the top 3, where 1 minus the rest would leave nothing."""
    N, V = 5, 2000
    z_NV = torch.randn(N, V, dtype=torch.float64).clamp(-3, 3)
    z_NV[:, [5, 600, 1999]] += 70.0
    z_NV = (z_NV + offset).float()
    found = linear_logprobs(torch.eye(N), z_NV.T.contiguous(), top_k=3, candidate_ids=torch.tensor([[600, 5, 1999]] * N), impl="cpu")
    truth = z_NV.double().log_softmax(1).index_fill(1, torch.tensor([5, 600, 1999]), -torch.inf).logsumexp(1)
    assert truth.max() < -60
    assert (found.log_tail - truth).abs().max() < 1e-3
    assert (found.candidates_log_tail - truth).abs().max() < 1e-3


def test_of_equal_logits_the_lower_id_comes_first() -> None:
    N, V, K = 4, 3000, 300
    z_NV = torch.randint(-2, 3, (N, V), generator=torch.Generator().manual_seed(1)).float()
    z_NV[z_NV == 0] *= -1.0  # a negative zero equals a positive one
    z_NV[1] = 1.0
    found = linear_logprobs(torch.eye(N), z_NV.T.contiguous(), top_k=K, impl="cpu")
    expected = z_NV.sort(dim=1, descending=True, stable=True).indices[:, :K]
    assert torch.equal(found.topk_ids, expected)


def test_masked_logits_have_no_mass_and_fill_what_is_left_of_top_k() -> None:
    V, K = 900, 12
    bias = torch.full((V,), -torch.inf)
    bias[[3, 400, 899]] = torch.tensor([0.0, 1.0, -1.0])
    asked = {"top_k": K, "candidate_ids": torch.tensor([[400, 7, -1]]), "token_ids": torch.tensor([899])}
    found = linear_logprobs(torch.zeros(1, 4), torch.zeros(V, 4), bias=bias, impl="cpu", **asked)
    truth = linear_logprobs(torch.zeros(1, 4), torch.zeros(V, 4), bias=bias, impl="reference", **asked)
    assert found.topk_ids.tolist() == truth.topk_ids.tolist() == [[400, 3, 899, 0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert found.log_tail.item() == -torch.inf
    assert_near(found, truth)


def test_repeats_are_bitwise_equal_and_thread_counts_nearly() -> None:
    hidden, weight, generator = draw(97, 2001, 48, torch.float32)
    token_ids, candidate_ids = some_ids(97, 2001, 9, generator)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(linear_logprobs(hidden, weight, top_k=50, token_ids=token_ids, candidate_ids=candidate_ids, impl="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(getattr(results[1], name), getattr(results[2], name)) for name in (*FIELDS, "topk_ids"))
    for other in results[1:]:
        assert torch.equal(other.topk_ids, results[0].topk_ids)
        assert_near(other, results[0], 1e-6)


def test_tokens_beyond_one_chunk_of_lists() -> None:
    """So many ids a token that the lists of all tokens do not fit into memory's share at once."""
    N, V, K = 1500, 2100, 1000
    hidden, weight, _ = draw(N, V, 6, torch.float32, spread=2.0)
    assert_near(linear_logprobs(hidden, weight, top_k=K, impl="cpu"), linear_logprobs(hidden, weight, top_k=K, impl="reference"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_is_refused(value: float) -> None:
    hidden = torch.ones(3, 4)
    hidden[1, 2] = value
    with pytest.raises(ValueError, match=r"logits of token 1 are not finite"):
        linear_logprobs(hidden, torch.ones(700, 4), top_k=5, impl="cpu")


def test_the_op_is_registered_as_torch_expects() -> None:
    hidden, weight, generator = draw(5, 300, 8, torch.float32)
    token_ids, candidate_ids = some_ids(5, 300, 4, generator)
    arguments = (hidden.detach(), weight.detach(), None, token_ids, candidate_ids, 3, 2.0, 1.0, None, 300, True, 0)
    torch.library.opcheck(torch.ops.bbopd.linear_logprobs_cpu.default, arguments)


def test_float64_is_left_to_the_reference() -> None:
    hidden, weight, _ = draw(2, 20, 4, torch.float64)
    assert linear_logprobs(hidden, weight, top_k=2).logsumexp.dtype == torch.float64
    with pytest.raises(ValueError, match=r"impl='cpu' takes float32, bfloat16 and float16 tensors on a CPU, not torch.float64 on cpu"):
        linear_logprobs(hidden, weight, top_k=2, impl="cpu")
