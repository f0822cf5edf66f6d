"""A Hugging Face model as a teacher, against its own full forward pass, sequence by sequence, in fp64."""

from __future__ import annotations

import asyncio
import dataclasses

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.server import start_server
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec, Teacher
from tests.waiting import PATIENCE

VOCAB = 331


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=2,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({f"w{number}": number for number in range(VOCAB)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


def make_rollouts(count: int, seed: int = 0) -> list[Rollout]:
    random = np.random.default_rng(seed)
    made: list[Rollout] = []
    for number in range(count):
        prompt = Prompt(f"p{number}", tuple(random.integers(0, VOCAB, random.integers(1, 20)).tolist()))
        answer = tuple(random.integers(0, VOCAB, random.integers(1, 40)).tolist())
        width = int(random.integers(2, 9))
        ids = np.stack([random.permutation(VOCAB)[:width] for _ in answer]).astype(np.int32)
        made.append(Rollout(f"r{number}", prompt, answer, candidate_ids=ids))
    return made


@torch.no_grad()
def dense(model, rollout, temperature=1.0):
    """Log-softmax [L, V] in fp64 of the rows that predict the response, from a forward pass of this sequence alone."""
    logits = model(torch.tensor([rollout.all_ids])).logits[0].double()
    return torch.log_softmax(logits[len(rollout.prompt.token_ids) - 1 : -1] / temperature, -1).numpy()


def check(model, rollout, signal, want):
    expected = dense(model, rollout, 1.0 if want.level == "full" else want.temperature)
    if want.level == "full":
        np.testing.assert_allclose(signal.logits, expected - expected.max(axis=1, keepdims=True), rtol=1e-3, atol=1e-4)
        assert (signal.logits.max(axis=1) == 0).all()
        return
    rows = np.arange(len(rollout))
    np.testing.assert_allclose(signal.sampled, expected[rows, list(rollout.token_ids)], atol=1e-4)
    if want.level == "sampled":
        return
    if want.level == "topk":
        best = -np.sort(-expected, axis=1)[:, : want.top_k]
        np.testing.assert_allclose(signal.logprobs, best, atol=5e-3)
        np.testing.assert_allclose(np.take_along_axis(expected, signal.ids, 1), best, atol=1e-4)
    else:
        np.testing.assert_array_equal(signal.ids, rollout.candidate_ids)
        np.testing.assert_allclose(signal.logprobs, np.take_along_axis(expected, rollout.candidate_ids, 1), atol=5e-3)
    outside = np.exp(expected).sum(1) - np.exp(np.take_along_axis(expected, signal.ids, 1)).sum(1)
    np.testing.assert_allclose(np.exp(signal.log_tail), outside, atol=5e-3)


async def stream(items):
    for item in items:
        yield item


WANTS = [
    SignalSpec("full", 2.0),
    SignalSpec("topk", 1.0, 16),
    SignalSpec("topk", 2.5, 16),
    SignalSpec("candidates", 0.7),
    SignalSpec("sampled", 1.3),
]


@pytest.mark.parametrize("want", WANTS, ids=str)
def test_a_packed_batch_scores_every_sequence_as_if_alone(model, want):
    rollouts = make_rollouts(7)
    signals = HFBackend(model).score(rollouts, want)
    assert len(signals) == 7
    for rollout, signal in zip(rollouts, signals, strict=True):
        check(model, rollout, signal, want)


@pytest.mark.parametrize("want", [WANTS[1], WANTS[3]], ids=str)
def test_rollouts_of_one_prompt_share_it_and_score_as_if_alone(model, want):
    made = make_rollouts(9)
    groups = [made[0], made[1], made[0], made[2], made[1], made[0], *made[6:]]  # whose prompt each one has
    rollouts = [dataclasses.replace(one, prompt=group.prompt) for one, group in zip(made, groups, strict=True)]
    rollouts.append(one_token_answer(rollouts[0]))
    assert len({rollout.prompt.token_ids for rollout in rollouts}) < len(rollouts) - 2
    for rollout, signal in zip(rollouts, HFBackend(model).score(rollouts, want), strict=True):
        check(model, rollout, signal, want)


def one_token_answer(rollout):
    candidates = {} if rollout.candidate_ids is None else {"candidate_ids": rollout.candidate_ids[:1]}
    return dataclasses.replace(rollout, rollout_id="short", token_ids=rollout.token_ids[:1], **candidates)


@pytest.mark.parametrize("want", WANTS[:2], ids=str)
async def test_the_same_across_grpc(model, want):
    server = await start_server(HFBackend(model), batch_tokens=200)
    teacher = await RemoteTeacher.connect(f"grpc://127.0.0.1:{server.port}")
    scored = [one async for one in teacher.score(stream(make_rollouts(12, seed=1)), want)]
    await teacher.close()
    await server.stop(1)
    assert len(scored) == 12
    for one in scored:
        check(model, one.rollout, one.signal, want)


async def test_in_this_process_with_the_same_limits(model):
    teacher = LocalTeacher(HFBackend(model, max_top_k=32), batch_tokens=100)
    assert isinstance(teacher, Teacher)
    want = SignalSpec("topk", 1.0, 8)
    scored = [one async for one in teacher.score(stream(make_rollouts(9)), want)]
    assert [one.rollout.rollout_id for one in scored] == [f"r{n}" for n in range(9)]
    for one in scored:
        check(model, one.rollout, one.signal, want)
    with pytest.raises(TeacherError, match=r"top_k 33 is outside 1..32"):
        await anext(teacher.score(stream([]), SignalSpec("topk", 1.0, 33)))
    with pytest.raises(TeacherError, match=r"129 tokens, more than .* 128"):
        await anext(teacher.score(stream([Rollout("x", Prompt("p", (1,)), (1,) * 128)]), want))
    await teacher.close()


def test_what_it_says_of_itself(model):
    info = HFBackend(model, max_top_k=1024, max_sequence_tokens=64, name="tiny", revision="abc").info
    assert (info.model, info.revision, info.vocab_size, info.max_sequence_tokens) == ("tiny", "abc", VOCAB, 64)
    assert [offer.level for offer in info.offers] == ["full", "candidates", "topk", "sampled"], "no text without a tokenizer"
    assert info.offer("topk").max_top_k == VOCAB


def test_a_weight_that_is_nan_is_an_error_by_name(model):
    broken = LlamaForCausalLM(model.config).eval()
    backend = HFBackend(broken)
    with torch.no_grad():
        broken.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")

    async def score(want):
        return [one async for one in LocalTeacher(backend).score(stream(make_rollouts(2)), want)]

    with pytest.raises(BadAnswerError, match=r"rollout r0: .*nan"):
        asyncio.run(score(SignalSpec("full")))


def greedy(model, prompt, count):
    ids = list(prompt.token_ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    return tuple(ids[len(prompt.token_ids) :])


def test_greedy_answers_are_those_of_each_prompt_alone(model, tokenizer):
    backend = HFBackend(model, tokenizer)
    assert backend.info.offer("text") is not None
    assert len(backend.info.vocab_sha256) == len(backend.info.tokenizer_sha256) == 64
    prompts = [rollout.prompt for rollout in make_rollouts(12)]
    stop = greedy(model, prompts[0], 8)[3]
    written = backend.generate(prompts, Sampling(8, top_k=1, stop_token_ids=(stop,)))
    for prompt, done in zip(prompts, written, strict=True):
        expected = greedy(model, prompt, 8)
        expected = expected[: expected.index(stop) + 1] if stop in expected else expected
        assert done.token_ids == expected
        assert done.finish_reason == ("stop" if expected[-1] in (2, stop) else "length")
        assert done.text.split() == [f"w{token}" for token in expected if token != 2]


def test_sampled_answers_follow_the_seed_and_leave_the_callers_alone(model, tokenizer):
    backend = HFBackend(model, tokenizer)
    prompts = [rollout.prompt for rollout in make_rollouts(4)] + [Prompt("again", (5, 6))]
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    first, same, other = (backend.generate(prompts, Sampling(8, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected), "the caller's random numbers are untouched"
    assert first == same
    assert [done.token_ids for done in first] != [done.token_ids for done in other]
    renamed = [Prompt(f"{prompt.prompt_id} again", prompt.token_ids) for prompt in prompts]
    assert [done.token_ids for done in first] != [done.token_ids for done in backend.generate(renamed, Sampling(8, seed=1))]


def test_sampling_is_from_the_distribution_at_its_temperature(model, tokenizer):
    prompt = Prompt("p", (7, 9))
    rows = [Prompt(f"p{number}", prompt.token_ids) for number in range(3000)]
    first = np.array([done.token_ids[0] for done in HFBackend(model, tokenizer).generate(rows, Sampling(1, temperature=0.6, seed=3))])
    p = np.exp(dense(model, Rollout("r", prompt, (0,)), 0.6)[0])
    counts = np.bincount(first, minlength=VOCAB)
    deviation = (counts - 3000 * p) / np.sqrt(3000 * p * (1 - p))
    assert np.abs(deviation[3000 * p > 5]).max() < 4.5
    assert (3000 * p > 5).sum() > 10


async def test_a_fake_teacher_that_dies():
    teacher = FakeTeacher(FakeBackend(VOCAB, die_after=3, delay=0.01))
    with pytest.raises(TeacherError, match="died after 3 rollouts"):
        async for _ in teacher.score(stream(make_rollouts(100)), SignalSpec("sampled")):
            pass


async def test_what_fails_in_the_backend_or_the_source_comes_out_by_name():
    teacher = FakeTeacher(FakeBackend(VOCAB, failures={"r1": 1}))
    with pytest.raises(TeacherError, match="teacher fake-331-0 failed: RuntimeError: cannot score r1"):
        await anext(teacher.score(stream(make_rollouts(3)), SignalSpec("sampled")))

    async def failing():
        yield make_rollouts(1)[0]
        raise KeyError("the source's own")

    answers = teacher.score(failing(), SignalSpec("sampled"))
    assert (await anext(answers)).rollout.rollout_id == "r0"
    with pytest.raises(KeyError, match="the source's own"):
        await anext(answers)


async def test_a_source_that_waits_for_each_answer_is_served():
    answered = asyncio.Event()
    answered.set()

    async def one_at_a_time():
        for rollout in make_rollouts(4):
            await asyncio.wait_for(answered.wait(), PATIENCE)
            answered.clear()
            yield rollout

    count = 0
    async for _ in FakeTeacher(FakeBackend(VOCAB)).score(one_at_a_time(), SignalSpec("sampled")):
        count += 1
        answered.set()
    assert count == 4
