"""A frozen student: logprobs as of a float64 forward pass, unmoved by training, and brought back from saved tensors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from bbopd.data.streams import each
from bbopd.modeling import output_head
from bbopd.modeling.response_logprobs import response_logprobs
from bbopd.pipeline.referenced import ReferencedScores
from bbopd.pipeline.rewards import GroupRewards
from bbopd.trainer.reference_policy import ReferencePolicy
from bbopd.types import Prompt, Rollout, SignalSpec, Unscored
from tests.test_lora import adapted
from tests.test_rewards import TimedJudge, grouped
from tests.tiny_models import tiny_gemma2, tiny_llama, tiny_qwen2

USED = 300  # of 320 ids


def random_rollouts(seed: int, temperature: float, count: int = 5) -> list[Rollout]:
    random = np.random.default_rng(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(int(token) for token in random.integers(0, USED, random.integers(1, most)))

    return [Rollout(str(n), Prompt("p", ids(9)), ids(20), temperature=temperature, draw=n) for n in range(count)]


def oracle(model, rollout: Rollout) -> np.ndarray:
    start = len(rollout.prompt.token_ids) - 1
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(input_ids=torch.tensor([rollout.all_ids]), use_cache=False).logits[0, start:-1, :USED]
    chosen = torch.tensor(rollout.token_ids)[:, None]
    return (logits.double() / rollout.temperature).log_softmax(-1).gather(1, chosen)[:, 0].numpy()


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gemma2], ids=["llama", "qwen2", "gemma2"])
@pytest.mark.parametrize("micro_batch_tokens", [4096, 30])
def test_logprobs_stay_those_of_the_moment_it_was_made(make, micro_batch_tokens):
    student = make()
    rollouts = random_rollouts(3, temperature=0.8)
    expected = [oracle(student, rollout) for rollout in rollouts]
    reference = ReferencePolicy(student, compute_dtype=torch.float32, vocab_size=USED, micro_batch_tokens=micro_batch_tokens)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    for found, wanted in zip(reference.logprobs(rollouts), expected, strict=True):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-4)


def test_it_comes_back_from_its_tensors_and_refuses_those_of_another_model():
    rollouts = random_rollouts(4, temperature=1.0)
    one, other = (ReferencePolicy(tiny_llama(seed=seed), compute_dtype=torch.float32) for seed in (0, 1))
    before = other.logprobs(rollouts)
    other.load_tensors({name: tensor.clone() for name, tensor in one.tensors().items()})
    for found, wanted, old in zip(other.logprobs(rollouts), one.logprobs(rollouts), before, strict=True):
        np.testing.assert_array_equal(found, wanted)
        assert np.abs(found - old).max() > 0.01
    with pytest.raises(ValueError, match="another model"):
        other.load_tensors(ReferencePolicy(tiny_llama(hidden=64), compute_dtype=torch.float32).tensors())
    assert not any(parameter.requires_grad for parameter in other._copy.model.parameters())


def test_of_a_student_with_adapters_these_alone_are_copied():
    student = adapted(tiny_llama(vocab_size=320))
    rollouts = random_rollouts(5, temperature=1.0)
    reference = ReferencePolicy(student, compute_dtype=torch.float32)
    before = reference.logprobs(rollouts)
    for found, rollout in zip(before, rollouts, strict=True):
        expected = response_logprobs(student, output_head(student), [rollout], compute_dtype=torch.float32)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    theirs = dict(student.named_parameters())
    for name, parameter in reference._copy.model.named_parameters():
        assert (parameter is theirs[name]) != ("lora_" in name), name
    assert set(reference.tensors()) == {name for name in theirs if "lora_" in name}
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in theirs.items()), "the student is still trained"
    kept = {name: tensor.clone() for name, tensor in reference.tensors().items()}
    with torch.no_grad():
        for name, parameter in theirs.items():
            if "lora_" in name:
                parameter.add_(0.1)
    for found, old in zip(reference.logprobs(rollouts), before, strict=True):
        np.testing.assert_array_equal(found, old)
    later = ReferencePolicy(student, compute_dtype=torch.float32)
    later.load_tensors(kept)
    for found, old in zip(later.logprobs(rollouts), before, strict=True):
        np.testing.assert_array_equal(found, old)


async def test_judged_answers_carry_what_the_reference_thinks_of_them():
    model = tiny_llama()
    before = copy.deepcopy(model)
    judge = TimedJudge(seconds=lambda group: 0.0, skips=lambda rollout: rollout.draw == 1)
    stage = ReferencedScores(GroupRewards(judge), ReferencePolicy(model, compute_dtype=torch.float32, vocab_size=USED))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    labelled = Rollout("l", Prompt("q", (1,)), (1, 2), origin="reference", draw=99)
    found = {one.rollout.draw: one async for one in stage.score(each([*grouped([3, 2]), labelled]), SignalSpec("text"))}
    assert isinstance(found.pop(1), Unscored)
    assert found.pop(99).signal.reference_logprobs is None
    assert len(found) == 4
    for scored in found.values():
        assert scored.signal.advantages is not None
        np.testing.assert_allclose(scored.signal.reference_logprobs, oracle(before, scored.rollout), atol=1e-5)
