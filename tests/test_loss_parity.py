"""One set of rollouts down every way that a loss can go: the same value and the same gradient of every weight of the student.

The truth is dense float64: each sequence by itself through the student's own forward pass, its loss by the oracle. Beside it stand the
packed pass with the reference in float64 and with the C++ engine in float32, each for any split into micro-batches, with signals from a
teacher in this process and from one behind gRPC.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, RunConfig
from bbopd.data.assemble import Item, assemble, rollout_of
from bbopd.data.streams import each
from bbopd.modeling import output_head, packed_attention, packed_hidden
from bbopd.objectives import make_objective, signal_for
from bbopd.rollouts.candidates import CandidateChooser
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.types import IGNORE_INDEX, Prompt, Rollout, Sampling, SignalSpec
from tests.distill_oracle import oracle
from tests.faults import served
from tests.tiny_models import tiny_llama, tiny_qwen2

V = 320
SPLITS = ((8,), (1, 1, 1, 1, 1, 1, 1, 1), (3, 5))
CASES = {
    "full, T = 2": ({"name": "forward_kl", "temperature": 2.0}, {"signal": "full"}),
    "full, jsd": ({"name": "jsd", "temperature": 1.0, "beta": 0.3}, {"signal": "full"}),
    "topk": ({"name": "forward_kl", "temperature": 1.0}, {"topk": 16}),
    "candidates": ({"name": "reverse_kl", "temperature": 1.0}, {"signal": "candidates", "topk": 16}),
    "sampled": ({"name": "policy_gradient", "temperature": 1.0, "clip": None}, {"signal": "sampled"}),
}
# Of a gradient's norm, and of a loss. What crosses the wire with ids is float16 (2^-11 of a logprob), as a whole distribution is anywhere.
WIRE, SINGLE, DOUBLE = 4e-3, 5e-5, 1e-6


def config_of(objective: dict, teacher: dict) -> RunConfig:
    given = {"student": {"model": "tiny"}, "teacher": {"target": "grpc://localhost:1", **teacher}, "data": {"prompts": [{"demo": True}]}}
    return RunConfig.model_validate(
        {**given, "objective": {"ramp": 0, "ce_weight": 0.4, "kd_weight": 0.8, **objective}, "rollouts": {"temperature": 1.0}}
    )


async def sequences(model, count: int) -> list[Rollout]:
    """Five that the student writes, and three labelled ones, with the ids that it would be asked about."""
    random = np.random.default_rng(3)
    prompts = [Prompt(f"p{i}", tuple(random.integers(3, V, 2 + i).tolist())) for i in range(5)]
    engine = HFEngine(model, eos_token_ids=(2,), pad_token_id=0)
    written = [rollout async for rollout in engine.generate(each(prompts), Sampling(12, seed=5))]
    labelled = [
        Rollout(f"l{i}", prompts[i], tuple(random.integers(3, V, 9 - i).tolist()), origin="reference", draw=5 + i) for i in range(3)
    ]
    choose = CandidateChooser(model, count=count, compute_dtype=torch.float32, vocab_size=V)
    return choose(sorted([*written, *labelled], key=lambda rollout: rollout.draw))


async def scored(teacher, rollouts: Sequence[Rollout], want: SignalSpec) -> list[Item]:
    asked = [rollout for rollout in rollouts if not (want.rollouts_only and rollout.is_labelled)]
    items: list[Item] = [rollout for rollout in rollouts if rollout not in asked]
    items += [item async for item in teacher.score(each(asked), want)]
    return sorted(items, key=lambda item: rollout_of(item).draw)


def followed_back(model, loss: Tensor) -> tuple[float, Tensor]:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return loss.item(), torch.cat([gradient.flatten().double() for gradient in gradients])


def dense(model, config: ObjectiveConfig, items: Sequence[Item], want: SignalSpec) -> tuple[float, Tensor]:
    """The truth, of float64 weights."""
    batch = assemble(items, want)
    rollouts = [rollout_of(item) for item in items]
    z_NV = torch.cat([model(torch.tensor([r.all_ids])).logits[0, len(r.prompt.token_ids) - 1 : -1] for r in rollouts])
    options = {} if want.level == "sampled" else {"divergence": config.name, "beta": config.beta, "skew": config.skew}
    loss, _, _ = oracle(z_NV, batch.teacher, batch.labels, temperature=config.temperature, ce_weight=0.4, kd_weight=0.8, **options)
    return followed_back(model, loss)


def packed(model, config: ObjectiveConfig, items: Sequence[Item], want: SignalSpec, split: Sequence[int]) -> tuple[float, Tensor]:
    """The way of a run: micro-batches without padding, each with its part of the step's mean."""
    whole, head, parts, start = assemble(items, want), output_head(model), [], 0
    signals = len(whole.labels) if whole.teacher.valid is None else int(whole.teacher.valid.sum())
    normalizer = (float((whole.labels != IGNORE_INDEX).sum()), float(signals))
    for count in split:
        batch = assemble(items[start : start + count], want)
        start += count
        with packed_attention(model):
            hidden_PD = packed_hidden(model, batch.input_ids, batch.position_ids, batch.boundaries)
        how = {"ce_weight": 0.4, "kd_weight": 0.8, "normalizer": normalizer}
        parts.append(make_objective(config).loss(hidden_PD[batch.target_rows], head, batch, **how).loss)
    return followed_back(model, sum(parts))


def same(found: tuple[float, Tensor], truth: tuple[float, Tensor], tolerance: float) -> None:
    assert found[0] == pytest.approx(truth[0], rel=tolerance, abs=tolerance)
    assert (found[1] - truth[1]).norm() <= tolerance * truth[1].norm()


@pytest.mark.parametrize("name", CASES)
async def test_every_way_gives_the_same_loss_and_gradient(name):
    config = config_of(*CASES[name])
    want = signal_for(make_objective(config.objective), config.teacher)
    student, backend = tiny_llama(V, seed=1), HFBackend(tiny_qwen2(V, seed=2))
    exact = copy.deepcopy(student).double()
    rollouts = await sequences(student, 16)
    assert sum(split := SPLITS[2]) == len(rollouts), split
    here = await scored(LocalTeacher(backend), rollouts, want)
    async with served(backend) as remote:
        over_the_wire = await scored(remote, rollouts, want)
    truth = dense(exact, config.objective, here, want)
    assert truth[1].norm() > 1e-3
    for split in SPLITS:
        same(packed(exact, config.objective, here, want, split), truth, DOUBLE)
        same(packed(student, config.objective, here, want, split), truth, SINGLE)
    came = dense(exact, config.objective, over_the_wire, want)
    same(came, truth, WIRE)
    for split in SPLITS:
        same(packed(exact, config.objective, over_the_wire, want, split), came, DOUBLE)
        same(packed(student, config.objective, over_the_wire, want, split), came, SINGLE)
