"""Divergences on ids that the student chose, end to end: engine, gRPC server, assembled batch and loss, against dense float64.

Shape suffixes: ``N`` response tokens, ``V`` vocabulary, ``K`` candidates, ``C = K + 1`` classes with the tail.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from bbopd import linear_distill
from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.data.assemble import assemble
from bbopd.modeling import packed_hidden
from bbopd.objectives import make_objective
from bbopd.output_head import OutputHead
from bbopd.rollouts.candidates import CandidateChooser
from bbopd.rollouts.hf import HFEngine
from bbopd.teachers.hf import HFBackend
from bbopd.teachers.local import LocalTeacher
from bbopd.trainer import Trainer
from bbopd.types import FullTeacher, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec
from tests.distill_oracle import bucket, compare, logits_of, oracle, oracle_kd
from tests.faults import served, stream
from tests.tiny_models import tiny_llama, tiny_qwen2

V = 262
NAMES = ("reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
WANT = SignalSpec("candidates", 1.0)


def student():
    return tiny_llama(vocab_size=V, seed=1)


def teacher():
    return tiny_qwen2(vocab_size=V, seed=2)


async def sequences(model, K: int, count: int = 5) -> list[Rollout]:
    """Rollouts that the engine wrote with their candidates, and labelled sequences that the student has read."""
    random = np.random.default_rng(K)
    prompts = [Prompt(f"p{i}", tuple(random.integers(3, V, 2 + i).tolist())) for i in range(count)]
    engine = HFEngine(model, eos_token_ids=(2,), pad_token_id=0, candidates=K)
    written = [rollout async for rollout in engine.generate(stream(prompts), Sampling(12, seed=5))]
    known = [
        Rollout(f"l{i}", prompt, tuple(random.integers(3, V, 9 - i).tolist()), origin="reference", draw=count + i)
        for i, prompt in enumerate(prompts[:3])
    ]
    choose = CandidateChooser(model, count=K, compute_dtype=torch.float32, vocab_size=V)
    return sorted(choose([*written, *known]), key=lambda rollout: rollout.draw)


async def ask(rollouts: list[Rollout], want: SignalSpec = WANT) -> list[ScoredRollout]:
    """Over a real server on loopback, in the order of drawing."""
    async with served(HFBackend(teacher())) as remote:
        scored = [item async for item in remote.score(stream(rollouts), want)]
    return sorted(scored, key=lambda item: item.rollout.draw)


def dense_teacher(rollouts: list[Rollout]) -> torch.Tensor:
    """Logits [N, V] float64, one ordinary forward pass a sequence."""
    model = teacher().double()
    with torch.no_grad():
        rows = [model(torch.tensor([r.all_ids])).logits[0, len(r.prompt.token_ids) - 1 : -1] for r in rollouts]
    return torch.cat(rows)


def student_hidden(model, batch) -> torch.Tensor:
    with torch.no_grad():
        hidden_PD = packed_hidden(model, batch.input_ids, batch.position_ids, batch.boundaries)
    return hidden_PD[batch.target_rows]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("K", [1, 8, 64])
async def test_the_loss_is_the_bucketed_divergence_of_dense_distributions(name, K):
    model = student()
    rollouts = await sequences(model, K)
    batch = assemble(await ask(rollouts), WANT)
    log_p_NV = dense_teacher(rollouts).log_softmax(1)
    ids_NK = batch.teacher.ids
    own_N = torch.tensor([token for rollout in rollouts for token in rollout.token_ids])
    assert (ids_NK == own_N[:, None]).any(1).all(), "the token itself is always in the support"
    # what came over the wire is the dense distribution at those ids, to float16, and its tail
    dense_NC = torch.stack([bucket(log_p, ids) for log_p, ids in zip(log_p_NV, ids_NK, strict=True)])
    came_NC = torch.cat([batch.teacher.logprobs, batch.teacher.log_tail[:, None]], 1).double()
    mass_NC = dense_NC.exp()
    assert ((came_NC - dense_NC).abs() <= 2e-3 + 2.0**-10 * dense_NC.abs())[mass_NC > 1e-12].all()

    hidden_ND = student_hidden(model, batch).double().requires_grad_()
    weight_VD = model.get_output_embeddings().weight.detach().double().requires_grad_()
    config = ObjectiveConfig(name=name, temperature=1.0, beta=0.3, skew=0.2)

    def loss():
        return make_objective(config).loss(hidden_ND, OutputHead(weight_VD), batch, ce_weight=0.4, kd_weight=0.8, normalizer=None)

    found, z_NV = loss(), logits_of(hidden_ND, weight_VD)
    # of the distribution as it came: to the last digits
    exact, _, _ = oracle(z_NV, batch.teacher, batch.labels, divergence=name, beta=0.3, skew=0.2, ce_weight=0.4, kd_weight=0.8)
    compare(loss().loss, exact, (hidden_ND, weight_VD), 1e-9)
    # of the dense one: as far as float16 goes
    dense = replace(batch.teacher, logprobs=dense_NC[:, :-1], log_tail=dense_NC[:, -1])
    truth, _, kd_N = oracle(
        logits_of(hidden_ND, weight_VD), dense, batch.labels, divergence=name, beta=0.3, skew=0.2, ce_weight=0.4, kd_weight=0.8
    )
    torch.testing.assert_close(found.kd.double(), kd_N.detach(), rtol=4e-3, atol=4e-3)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, (hidden_ND, weight_VD)), torch.autograd.grad(truth, (hidden_ND, weight_VD)), strict=True
    ):
        assert (ours - theirs).norm() <= 4e-3 * theirs.norm()
    # a lower bound of the divergence over the whole vocabulary
    log_q_NV = z_NV.detach().log_softmax(1)
    whole = torch.stack([oracle_kd(p, q, name, 0.3, 0.2) for p, q in zip(log_p_NV, log_q_NV, strict=True)])
    assert (kd_N <= whole + 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
async def test_all_ids_as_candidates_are_the_dense_loss(name):
    model = student()
    rollouts = await sequences(model, V, count=3)
    batch = assemble(await ask(rollouts), WANT)
    whole = replace(batch, teacher=FullTeacher(logits=dense_teacher(rollouts).float()))
    hidden_ND = student_hidden(model, batch).requires_grad_()
    weight_VD = model.get_output_embeddings().weight.detach().clone().requires_grad_()
    objective = make_objective(ObjectiveConfig(name=name, temperature=1.0))
    head = OutputHead(weight_VD)
    ours, dense = (objective.loss(hidden_ND, head, one, ce_weight=0.0, kd_weight=1.0, normalizer=None) for one in (batch, whole))
    torch.testing.assert_close(ours.kd, dense.kd, rtol=4e-3, atol=4e-3)
    for one, other in zip(
        torch.autograd.grad(ours.loss, (hidden_ND, weight_VD)), torch.autograd.grad(dense.loss, (hidden_ND, weight_VD)), strict=True
    ):
        assert (one - other).norm() <= 4e-3 * other.norm()


def gradients(trainer: Trainer, micro_batches) -> tuple[dict[str, float], list[torch.Tensor]]:
    found = trainer.accumulate(micro_batches)
    grads = [parameter.grad.clone() for parameter in trainer.model.parameters()]
    trainer.optimizer.zero_grad(set_to_none=True)
    return {name: float(value) for name, value in found.totals.items()}, grads


@pytest.mark.parametrize("name", NAMES)
async def test_one_loss_by_every_path_and_for_every_split(name):
    """Reference, C++, remote and in process, packed and by itself, split in any way: the same loss, tail mass and gradient."""
    model = student()
    rollouts = await sequences(model, 16)
    remote = await ask(rollouts)
    local = [item async for item in LocalTeacher(HFBackend(teacher())).score(stream(rollouts), WANT)]
    local.sort(key=lambda item: item.rollout.draw)
    config = ObjectiveConfig(name=name, temperature=1.0, alpha=0.3, ramp=0)
    trainer = Trainer(model, make_objective(config), train=TrainConfig(warmup=0), objective_config=config, planned_steps=9)

    totals, grads = gradients(trainer, [assemble(remote, WANT)])
    for split in ([1] * 8, [3, 5], [2, 2, 4], [7, 1]):
        bounds = np.cumsum([0, *split])
        parts = [assemble(remote[start:stop], WANT) for start, stop in pairwise(bounds)]
        again, other = gradients(trainer, parts)
        assert again == pytest.approx(totals, rel=2e-5)
        for one, two in zip(grads, other, strict=True):
            assert (one - two).norm() <= 2e-5 * one.norm()
    in_process, other = gradients(trainer, [assemble(local, WANT)])
    assert in_process == pytest.approx(totals, rel=4e-3, abs=2e-3)  # float16 on the wire
    for one, two in zip(grads, other, strict=True):
        assert (one - two).norm() <= 1e-2 * one.norm()

    batch = assemble(remote, WANT)
    hidden_ND = student_hidden(model, batch)
    weight_VD = model.get_output_embeddings().weight.detach()
    options = {"divergence": name, "temperature": 1.0, "ce_weight": 0.3, "kd_weight": 0.7}
    results = {
        impl: linear_distill(hidden_ND, weight_VD, batch.teacher, batch.labels, impl=impl, **options) for impl in ("reference", "cpu")
    }
    torch.testing.assert_close(results["cpu"].kd, results["reference"].kd, rtol=2e-5, atol=2e-6)
    for result in results.values():
        assert result.loss.item() == pytest.approx(totals["loss"], rel=2e-5)
