"""The student's own ids: its best at every token and the token itself, the same from the engine as from a second reading, in every run."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from bbopd.config import TeacherConfig
from bbopd.errors import TeacherError
from bbopd.pipeline.preflight import check_candidates
from bbopd.rollouts.candidates import CandidateChooser, with_own_tokens
from bbopd.rollouts.fake import FakeEngine
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.fake import FakeBackend, FakeTeacher
from bbopd.types import Offer, Prompt, Rollout, Sampling, TeacherInfo
from tests.loop_rig import VOCAB, Rig, run_config
from tests.tiny_models import tiny_llama

SAMPLING = Sampling(max_new_tokens=14, seed=3)


def prompts(count: int) -> list[Prompt]:
    random = np.random.default_rng(count)
    return [Prompt(f"p{i}", tuple(random.integers(3, VOCAB, 3 + i % 4).tolist())) for i in range(count)]


async def write(engine: HFEngine, count: int, sampling: Sampling = SAMPLING) -> list[Rollout]:
    async def asked():
        for prompt in prompts(count):
            yield prompt

    return sorted([rollout async for rollout in engine.generate(asked(), sampling)], key=lambda rollout: rollout.draw)


def labelled(count: int) -> list[Rollout]:
    random = np.random.default_rng(9)
    return [
        Rollout(f"r{i}", prompt, tuple(random.integers(3, VOCAB, 1 + 5 * i % 17).tolist()), origin="reference")
        for i, prompt in enumerate(prompts(count))
    ]


def dense_logprobs(model, rollout: Rollout, vocab_size: int) -> np.ndarray:
    """[L, V] float64, by an ordinary forward pass of one sequence."""
    with torch.no_grad():
        z = model(torch.tensor([rollout.all_ids])).logits[0, len(rollout.prompt.token_ids) - 1 : -1, :vocab_size]
    return z.double().log_softmax(-1).numpy()


def check(model, rollout: Rollout, count: int, vocab_size: int = VOCAB) -> int:
    """Every row: the best ids, but for the own token in place of the last where it is none of them. How often it was not."""
    assert rollout.candidate_ids is not None
    assert rollout.candidate_ids.dtype == np.int32
    assert rollout.candidate_ids.shape == (len(rollout), count)
    replaced = 0
    for ids, own, logprobs in zip(
        rollout.candidate_ids.tolist(), rollout.token_ids, dense_logprobs(model, rollout, vocab_size), strict=True
    ):
        assert len(set(ids)) == count
        assert own in ids
        best = np.sort(logprobs)[::-1][:count]
        if own in np.argsort(-logprobs)[:count]:
            np.testing.assert_allclose(logprobs[ids], best, atol=1e-5)
        else:
            replaced += 1
            assert ids[-1] == own
            np.testing.assert_allclose(logprobs[ids[:-1]], best[:-1], atol=1e-5)
    return replaced


@pytest.mark.parametrize("count", [1, 2, 7, VOCAB])
def test_a_second_reading_finds_the_best_ids_and_the_token_itself(count):
    model = tiny_llama(vocab_size=VOCAB)
    chosen = CandidateChooser(model, count=count, compute_dtype=torch.float32, vocab_size=VOCAB)(labelled(12))
    assert [rollout.rollout_id for rollout in chosen] == [f"r{i}" for i in range(12)]
    replaced = sum(check(model, rollout, count) for rollout in chosen)
    assert (replaced == 0) == (count == VOCAB), "random text holds tokens that are not among the few best"


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (1.7, 0), (1.0, 3)])
async def test_the_engine_names_them_while_it_samples(temperature, top_k):
    model = tiny_llama(vocab_size=VOCAB)
    sampling = replace(SAMPLING, temperature=temperature, top_k=top_k)
    engine = HFEngine(model, eos_token_ids=(2,), pad_token_id=0, candidates=6, max_batch=4)  # rows come and go
    rollouts = await write(engine, 11, sampling)
    assert sum(check(model, rollout, 6) for rollout in rollouts) > 0 or top_k
    bare = await write(HFEngine(model, eos_token_ids=(2,), pad_token_id=0, max_batch=4), 11, sampling)
    assert [one.token_ids for one in bare] == [one.token_ids for one in rollouts], "naming ids changes nothing that is drawn"
    assert all(one.candidate_ids is None for one in bare)
    read = CandidateChooser(model, count=6, compute_dtype=torch.float32, vocab_size=VOCAB)(bare)
    for one, other in zip(rollouts, read, strict=True):
        np.testing.assert_array_equal(np.sort(one.candidate_ids), np.sort(other.candidate_ids))


def test_ids_that_only_pad_the_head_are_never_chosen():
    model = tiny_llama(vocab_size=VOCAB + 10)
    with torch.no_grad():
        model.get_output_embeddings().weight[VOCAB:] *= 50.0  # they would be the best by far
    chosen = CandidateChooser(model, count=9, compute_dtype=torch.float32, vocab_size=VOCAB)(labelled(5))
    for rollout in chosen:
        check(model, rollout, 9)
        assert rollout.candidate_ids.max() < VOCAB


def test_what_has_been_chosen_is_kept_in_its_place():
    model = tiny_llama(vocab_size=VOCAB)
    choose = CandidateChooser(model, count=3, compute_dtype=torch.float32, vocab_size=VOCAB)
    mixed = labelled(6)
    own = np.zeros((len(mixed[2]), 1), np.int32)
    mixed[2] = replace(mixed[2], candidate_ids=own)
    chosen = choose(mixed)
    assert chosen[2].candidate_ids is own
    for index in (0, 1, 3, 4, 5):
        check(model, chosen[index], 3)
    assert choose([]) == []


def test_long_sequences_are_read_in_several_passes():
    model = tiny_llama(vocab_size=VOCAB, max_positions=2500)
    random = np.random.default_rng(0)
    long = [
        Rollout(f"r{i}", Prompt("p", (5, 6)), tuple(random.integers(3, VOCAB, length).tolist()))
        for i, length in enumerate((2100, 900, 900, 900))
    ]
    choose = CandidateChooser(model, count=4, compute_dtype=torch.float32, vocab_size=VOCAB)
    for rollout in choose(long):
        check(model, rollout, 4)


def test_the_own_token_takes_the_last_place_only_where_it_has_none():
    ids = torch.tensor([[4, 2, 9], [4, 2, 9], [1, 0, 3]])
    assert with_own_tokens(ids, torch.tensor([2, 5, 3])).tolist() == [[4, 2, 9], [4, 2, 5], [1, 0, 3]]
    assert with_own_tokens(ids[:, :1], torch.tensor([4, 5, 3])).tolist() == [[4], [5], [3]]


# ---------------------------------------------------------------- in a run


def candidate_config(output, **sections):
    base = {"objective": {"name": "reverse_kl"}, "rollouts": {"max_staleness": 0}}
    config = run_config(output, **{name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}})
    return config.model_copy(update={"teacher": TeacherConfig(target="grpc://localhost:1", signal="candidates", topk=5)})


class CandidateRig(Rig):
    """A loop whose student chooses ids. ``by_engine``: the engine names those of rollouts, else a second reading does."""

    def __init__(self, config, *, by_engine: bool = True, **options) -> None:
        super().__init__(config, **options)
        model = self.parts.trainer.model
        engine = HFEngine(model, eos_token_ids=(2,), pad_token_id=0, candidates=config.candidates if by_engine else 0)
        choose = CandidateChooser(model, count=config.candidates, compute_dtype=torch.float32, vocab_size=VOCAB)
        self.loop._parts = replace(self.parts, engine=engine, choose=choose)


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("by_engine", [True, False])
async def test_every_sequence_of_a_run_brings_its_candidates(tmp_path, staleness, by_engine):
    teacher = FakeTeacher(FakeBackend(VOCAB, levels=("candidates",)))
    rig = CandidateRig(candidate_config(tmp_path / "run", rollouts={"max_staleness": staleness}), teacher=teacher, by_engine=by_engine)
    assert await rig.run() == "finished"
    lines = rig.folder.read_lines("metrics.jsonl")
    assert all(line["signal_tokens"] == line["tokens"] for line in lines)
    assert all(line["kd"] > 0 for line in lines)
    assert any(line["labelled_tokens"] for line in lines)
    assert any(line["rollout_tokens"] for line in lines)
    assert all(0 < line["teacher_tail_mass"] < 1 for line in lines)


async def test_overlapping_cycles_choose_in_the_trainers_thread(tmp_path):
    config = candidate_config(tmp_path / "run", rollouts={"max_staleness": 1}, train={"cold_start_tokens": 0})
    with ThreadPoolExecutor(1) as executor:
        rig = Rig(config, engine=FakeEngine(VOCAB, eos_token_id=2), executor=executor)
        choose = CandidateChooser(rig.parts.trainer.model, count=5, compute_dtype=torch.float32, vocab_size=VOCAB)
        rig.loop._parts = replace(rig.parts, choose=choose)
        assert await asyncio.wait_for(rig.run(), 120) == "finished"
    assert all(line["signal_tokens"] == line["tokens"] for line in rig.folder.read_lines("metrics.jsonl"))


async def test_a_stopped_run_with_candidates_goes_on_to_the_same_losses(tmp_path):
    whole = CandidateRig(candidate_config(tmp_path / "whole"))
    await whole.run()
    config = candidate_config(tmp_path / "parts")
    first = CandidateRig(config, at_step=(3, lambda rig: rig.stop.set()))
    assert await first.run() == "stopped"
    second = CandidateRig(config)
    assert await second.run() == "finished"
    assert second.losses() == whole.losses()


async def test_reverse_kl_on_candidates_is_learned(tmp_path):
    config = candidate_config(tmp_path / "run", train={"on_policy_tokens": 1500, "lr": 5e-3}, objective={"alpha": 0.0, "ramp": 0})
    rig = CandidateRig(config)
    await rig.run()
    kd = [line["kd"] for line in rig.folder.read_lines("metrics.jsonl")]
    assert sum(kd[-4:]) < 0.8 * sum(kd[:4])


def test_more_ids_than_the_teacher_answers_at_are_refused_by_number():
    info = TeacherInfo("small", VOCAB, (Offer("candidates", 16),))
    check_candidates(info, 16)
    check_candidates(info, 0)
    with pytest.raises(TeacherError, match=r"teacher.topk is 17, but teacher small .* no more than 16 .*set teacher.topk=16 or less"):
        check_candidates(info, 17)
