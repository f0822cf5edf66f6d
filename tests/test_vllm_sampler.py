"""One random number a token: the token and logprob that exact sums give, with vLLM's own metadata, and vLLM's sampler for all else."""

import importlib.util
from dataclasses import replace

import numpy as np
import pytest
import torch

HAS_VLLM = importlib.util.find_spec("vllm") is not None
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not HAS_VLLM, reason="vLLM is not installed: make vllm"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of what vLLM imports
]

VOCAB = 1_003


def metadata(rows: int, *, temperature: float = 1.0, **changed):
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata

    plain = SamplingMetadata(
        temperature=torch.full((rows,), temperature),
        all_greedy=False,
        all_random=True,
        top_p=None,
        top_k=None,
        generators={row: torch.Generator().manual_seed(100 + row) for row in range(rows)},
        max_num_logprobs=0,
        no_penalties=True,
        prompt_token_ids=None,
        frequency_penalties=torch.zeros(rows),
        presence_penalties=torch.zeros(rows),
        repetition_penalties=torch.ones(rows),
        output_token_ids=[[] for _ in range(rows)],
        allowed_token_ids_mask=None,
        bad_words_token_ids={},
        logitsprocs=LogitsProcessors(),
    )
    return replace(plain, **changed)


def sampler():
    from bbopd.rollouts.vllm_sampler import RolloutSampler

    return RolloutSampler("processed_logprobs")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_where_the_sums_pass_the_drawn_number(temperature, dtype):
    rows = 24
    logits = (4.0 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(int(10 * temperature)))).to(dtype)
    logits[3, 7:] = -torch.inf  # most of a row has no probability
    found = sampler()(logits.clone(), metadata(rows, temperature=temperature))
    logprobs = (logits.double() / temperature).log_softmax(-1)
    sums = logprobs.exp().cumsum(-1)
    for row, (token, logprob) in enumerate(zip(found.sampled_token_ids[:, 0].tolist(), found.logprobs_tensors.logprobs[:, 0], strict=True)):
        drawn = float(torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(100 + row)))
        low = float(sums[row, token - 1]) if token else 0.0
        assert low - 1e-6 <= drawn <= float(sums[row, token]) + 1e-6
        assert float(logprob) == pytest.approx(float(logprobs[row, token]), abs=1e-5)
    assert torch.equal(found.logprobs_tensors.logprob_token_ids, found.sampled_token_ids)


def test_what_is_drawn_depends_on_the_request_alone():
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    together = sampler()(logits.clone(), metadata(6)).sampled_token_ids
    alone = sampler()(logits[:1].clone(), metadata(1)).sampled_token_ids
    assert together[0] == alone[0]


def test_frequencies_are_the_distribution():
    rows = 4_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)).expand(rows, -1).contiguous()
    ids = sampler()(logits.clone(), metadata(rows)).sampled_token_ids[:, 0].numpy()
    expected = logits[0].double().softmax(-1).numpy() * rows
    chi_square = float((np.square(np.bincount(ids, minlength=12) - expected) / expected).sum())
    assert chi_square < 33  # of 11 degrees of freedom: exceeded once in 2,000 times


def test_logits_that_are_no_numbers_give_logprobs_that_are_none():
    logits = torch.randn(3, VOCAB)
    logits[1, 4] = torch.nan
    assert not torch.isfinite(sampler()(logits, metadata(3)).logprobs_tensors.logprobs).all()


def test_requests_of_other_kinds_are_left_to_vllms_own_sampler():
    from bbopd.rollouts.vllm_sampler import is_plain

    logits = torch.zeros(5, VOCAB)
    assert is_plain(logits, metadata(5))
    for changed in (
        {"top_k": torch.full((5,), 1, dtype=torch.int32)},
        {"top_p": torch.full((5,), 0.5)},
        {"max_num_logprobs": 2},
        {"max_num_logprobs": None},
        {"all_random": False},
        {"generators": {0: torch.Generator()}},
    ):
        assert not is_plain(logits, metadata(5, **changed))
