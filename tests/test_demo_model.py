"""The demo's own model, as the package that carries it has it: read from GGUF, pruned, packed, and writing."""

import asyncio

import pytest
import torch

from bbopd import linear_logprobs
from bbopd.cli.demo import KEPT_LAYERS, find_model
from bbopd.config import InitConfig
from bbopd.data.streams import each
from bbopd.modeling import load_model, load_tokenizer, output_head, packed_hidden
from bbopd.rollouts.hf import HFEngine
from bbopd.types import Prompt, Sampling

pytestmark = pytest.mark.slow

TEXTS = ("The with statement is used to wrap the execution of a block.", "Water boils at a lower temperature on a mountain because")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(find_model())


@pytest.fixture(scope="module")
def student():
    return load_model(find_model(), keep_layers=InitConfig(keep_layers=KEPT_LAYERS).keep_layers)


def test_twenty_layers_remain_and_text_survives_the_tokenizer(student, tokenizer):
    assert student.config.num_hidden_layers == 20
    assert sum(parameter.numel() for parameter in student.parameters()) == pytest.approx(99e6, rel=0.02)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_packed_log_probabilities_are_those_of_the_model_itself(student, tokenizer):
    ids = [torch.tensor(tokenizer(text)["input_ids"]) for text in TEXTS]
    lengths = [len(part) for part in ids]
    boundaries = torch.tensor([0, lengths[0], sum(lengths)], dtype=torch.int32)
    head = output_head(student)
    with torch.no_grad():
        hidden = packed_hidden(student, torch.cat(ids), torch.cat([torch.arange(length) for length in lengths]), boundaries)
        targets = torch.cat(ids).roll(-1)
        packed = linear_logprobs(hidden, head.weight_VD, token_ids=targets).sampled
        alone = torch.cat([student(part[None]).logits[0].double().log_softmax(-1) for part in ids])
    assert packed is not None
    torch.testing.assert_close(packed.double(), alone.gather(1, targets[:, None])[:, 0], atol=2e-3, rtol=0)


def test_it_writes_with_the_log_probabilities_it_reports(student, tokenizer):
    prompts = [Prompt(f"p{index}", tuple(tokenizer(text)["input_ids"])) for index, text in enumerate(TEXTS)]
    engine = HFEngine(student, eos_token_ids=(tokenizer.eos_token_id,), pad_token_id=tokenizer.eos_token_id)

    async def write():
        return [rollout async for rollout in engine.generate(each(prompts), Sampling(max_new_tokens=6, temperature=1.0, seed=3))]

    for rollout in asyncio.run(write()):
        start = len(rollout.prompt.token_ids)
        with torch.no_grad():
            logprobs = student(torch.tensor([rollout.all_ids])).logits[0, start - 1 : -1].double().log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.from_numpy(rollout.logprobs).double(), expected, atol=2e-3, rtol=0)
