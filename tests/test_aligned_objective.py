"""The loss for a teacher with other tokens: its three parts and their gradients in float64, from the formulas alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bbopd.config import ObjectiveConfig, ServeConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import check_offer, make_objective, signal_for
from bbopd.objectives.rank import rank_distances
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, Offer, SampledTeacher, SpanTeacher, TeacherInfo, TopKTeacher
from tests.distill_oracle import compare, draw, logits_of, make_teacher, oracle
from tests.test_objectives import batch_of

HEADS = [{}, {"logit_scale": 1.4, "logit_softcap": 5.0}, {"vocab_size": 11}, {"bias": torch.linspace(-1, 1, 13).double(), "vocab_size": 12}]


def largest(N: int, K: int, V: int, generator) -> tuple[Tensor, Tensor]:
    """A teacher's K largest logprobs of V, in descending order, and its tail."""
    p = (2 * torch.randn(N, V, generator=generator, dtype=torch.float64)).softmax(1).sort(1, descending=True).values
    return p[:, :K].log(), p[:, K:].sum(1).log()


def rank_oracle(z_nV: Tensor, logprobs: Tensor, log_tail: Tensor, temperature: float) -> Tensor:
    """Rank by rank, with lists."""
    totals = []
    for z_V, p_K, tail in zip(z_nV, logprobs.exp(), log_tail.exp(), strict=True):
        q = (z_V / temperature).softmax(0).sort(descending=True).values
        total = (q[len(p_K) :].sum() - tail - p_K[len(q) :].sum()).abs()
        for k in range(min(len(p_K), len(q))):
            total = total + (q[k] - p_K[k]).abs()
        totals.append(total)
    return torch.stack(totals)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize(("K", "V", "temperature"), [(4, 30, 1.0), (4, 30, 2.0), (1, 9, 1.0), (20, 30, 1.0)])
def test_distances_by_rank(head, K, V, temperature):
    hidden, weight, generator = draw(7, 13, spread=3.0)
    logprobs, log_tail = largest(7, K, V, generator)
    factors = torch.linspace(-1, 2, 7).double()
    ours = rank_distances(hidden, OutputHead(weight, **head), logprobs, log_tail, temperature=temperature)
    z = logits_of(hidden, weight, head.get("bias"), head.get("logit_scale", 1.0), head.get("logit_softcap"), head.get("vocab_size"))
    theirs = rank_oracle(z[:, : head.get("vocab_size")], logprobs, log_tail, temperature)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    compare((ours * factors).sum(), (theirs * factors).sum(), (hidden, weight), 1e-9)


def test_with_all_ranks_the_distance_is_the_papers_and_that_of_the_same_distribution_is_0():
    hidden, weight, generator = draw(5, 13)
    q = logits_of(hidden, weight).softmax(1)
    p = torch.randn(5, 13, generator=generator, dtype=torch.float64).softmax(1)
    nothing = torch.full((5,), -torch.inf, dtype=torch.float64)
    ours = rank_distances(hidden, OutputHead(weight), p.sort(1, descending=True).values.log(), nothing)
    torch.testing.assert_close(ours, (q.sort(1).values - p.sort(1).values).abs().sum(1))
    for K in (3, 13):
        ranked = q.detach().sort(1, descending=True).values
        tail = ranked[:, K:].sum(1).log()
        assert rank_distances(hidden, OutputHead(weight), ranked[:, :K].log(), tail).max() < 1e-12
        cut = rank_distances(hidden, OutputHead(weight), p.sort(1, descending=True).values[:, :K].log(), nothing)
        assert (cut <= ours + 1 - p.sum(1) + 1).all()


def test_chunks_change_nothing_and_logits_of_all_rows_never_exist():
    hidden, weight, generator = draw(600, 30_000, D=3, dtype=torch.float32)
    logprobs, log_tail = (part.float() for part in largest(600, 5, 40, generator))
    ours = rank_distances(hidden, OutputHead(weight), logprobs, log_tail)
    assert 600 * 30_000 * 4 < 128 * 2**20 * 8, "more than one chunk"
    grads = torch.autograd.grad(ours.sum(), (hidden, weight))
    parts = [rank_distances(hidden[rows], OutputHead(weight), logprobs[rows], log_tail[rows]) for rows in torch.arange(600).split(77)]
    torch.testing.assert_close(ours, torch.cat(parts))
    for one, other in zip(grads, torch.autograd.grad(torch.cat(parts).sum(), (hidden, weight)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def mixed_batch(N: int, V: int, K: int, temperature: float, generator) -> DistillBatch:
    """Rows of ids, of spans, where one begins, of nothing, and labels on some of each."""
    kind = torch.randint(0, 4, (N,), generator=generator)
    labels = torch.where(torch.rand(N, generator=generator) < 0.5, torch.randint(0, V, (N,), generator=generator), -100)
    topk = make_teacher("topk", N, V, temperature, generator, K=K, valid=kind == 0)
    sampled = make_teacher("advantages", N, V, temperature, generator, valid=(kind == 1) | (kind == 2))
    rank_rows = (kind == 2).nonzero()[:, 0]
    logprobs, tail = largest(len(rank_rows), K, 17, generator)
    return replace(batch_of(topk, labels), spans=SpanTeacher(sampled, rank_rows, logprobs, tail, (kind == 1) | (kind == 2)))


@pytest.mark.parametrize("normalizer", [None, (7.0, 9.0)])
@pytest.mark.parametrize(("temperature", "t2_scaling"), [(1.0, True), (1.5, True), (1.5, False)])
@pytest.mark.parametrize("head", HEADS[:2])
def test_the_loss_is_the_sum_of_its_parts(head, temperature, t2_scaling, normalizer):
    hidden, weight, generator = draw(40, 13, seed=4)
    batch = mixed_batch(40, 13, 4, temperature, generator)
    config = ObjectiveConfig(name="aligned", temperature=temperature, t2_scaling=t2_scaling, span_weight=0.7, rank_weight=1.9)
    ours = make_objective(config).loss(hidden, OutputHead(weight, **head), batch, ce_weight=0.3, kd_weight=0.8, normalizer=normalizer)
    counts = normalizer or (int((batch.labels != -100).sum()), int((batch.teacher.valid | batch.spans.valid).sum()))
    z = logits_of(hidden, weight, None, head.get("logit_scale", 1.0), head.get("logit_softcap"))
    common = {"temperature": temperature, "t2_scaling": t2_scaling, "token_weight": batch.token_weight, "normalizer": counts}
    theirs, ce, on_ids = oracle(z, batch.teacher, batch.labels, ce_weight=0.3, kd_weight=0.8, **common)
    on_spans, _, of_spans = oracle(z, batch.spans.sampled, ce_weight=0.0, kd_weight=0.8 * 0.7, **common)
    rows, factor = batch.spans.rank_rows, 1.9 * (temperature**2 if t2_scaling else 1.0)
    ranks = factor * rank_oracle(z[rows], batch.spans.rank_logprobs, batch.spans.rank_log_tail, temperature)
    by_rank = 0.8 * (batch.token_weight[rows].double() * ranks).sum() / counts[1]
    compare(ours.loss, theirs + on_spans + by_rank, (hidden, weight), 1e-6)
    expected = on_ids + 0.7 * of_spans
    expected[rows] += ranks
    torch.testing.assert_close(ours.kd, expected.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(ours.ce, ce.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    signalled = int((batch.teacher.valid | batch.spans.valid).sum())
    assert ours.metrics["aligned_share"].item() == pytest.approx(int(batch.teacher.valid.sum()) / signalled)


def test_without_spans_it_is_forward_kl_to_the_last_bit():
    hidden, weight, generator = draw(9, 13, dtype=torch.float32)
    labels = torch.tensor([1, -100, 3, -100, 5, 6, -100, 8, 2])
    batch = batch_of(make_teacher("topk", 9, 13, 1.0, generator, dtype=torch.float32), labels)
    nothing = torch.zeros(9)
    none = torch.zeros(9, dtype=torch.bool)
    sampled = SampledTeacher(token_ids=torch.zeros(9, dtype=torch.long), behavior_logprobs=nothing, advantages=nothing, valid=none)
    aligned = replace(batch, spans=SpanTeacher(sampled, torch.zeros(0, dtype=torch.long), torch.zeros(0, 4), torch.zeros(0), none))
    losses = []
    for name, one in (("forward_kl", batch), ("aligned", aligned), ("aligned", batch)):
        objective = make_objective(ObjectiveConfig(name=name, temperature=1.0))
        out = objective.loss(hidden, OutputHead(weight), one, ce_weight=0.5, kd_weight=0.5, normalizer=(6.0, 9.0))
        losses.append((out.loss, out.kd, *torch.autograd.grad(out.loss, (hidden, weight))))
    for other in losses[1:]:
        assert all(torch.equal(a, b) for a, b in zip(losses[0], other, strict=True))


def test_a_span_as_one_event_reaches_its_reverse_kl_in_expectation():
    """Two tokens a, b of three each are one event ab; the exact expectation over the student's own spans is the gradient of KL(q||p)."""
    V, hidden = 3, torch.eye(4, dtype=torch.float64)
    weight = torch.randn(V, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    log_p = torch.randn(V, V, generator=torch.Generator().manual_seed(2), dtype=torch.float64).flatten().log_softmax(0).view(V, V)

    def log_q(first: int, second: int) -> Tensor:
        rows = (hidden @ weight.T).log_softmax(1)
        return rows[0, first] + rows[1 + first, second]

    table = torch.stack([torch.stack([log_q(a, b) for b in range(V)]) for a in range(V)])
    (exact,) = torch.autograd.grad((table.exp() * (table - log_p)).sum(), weight)
    estimate = torch.zeros_like(weight)
    objective = make_objective(ObjectiveConfig(name="aligned", temperature=1.0, rank_weight=0.0))
    for a in range(V):
        for b in range(V):
            rows = hidden[[0, 1 + a]]
            own = (rows @ weight.detach().T).log_softmax(1)
            behavior = torch.stack([own[0, a], own[1, b]])
            sampled = SampledTeacher(
                token_ids=torch.tensor([a, b]),
                behavior_logprobs=behavior,
                advantages=(log_p[a, b] - behavior.sum()).expand(2).clone(),
                valid=torch.ones(2, dtype=torch.bool),
            )
            topk = TopKTeacher(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 1), torch.full((2,), -torch.inf), 1.0, ~sampled.valid)
            spans = SpanTeacher(sampled, torch.zeros(0, dtype=torch.long), torch.zeros(0, 1), torch.zeros(0), sampled.valid)
            batch = replace(batch_of(topk, torch.full((2,), -100)), spans=spans, token_weight=torch.ones(2))
            out = objective.loss(rows, OutputHead(weight), batch, ce_weight=0.0, kd_weight=1.0, normalizer=(1.0, 1.0))
            (grad,) = torch.autograd.grad(out.loss, weight)
            estimate += behavior.sum().exp() * grad
    torch.testing.assert_close(estimate, exact, rtol=1e-6, atol=1e-8)


def test_which_teachers_it_takes():
    objective = make_objective(ObjectiveConfig(name="aligned", temperature=1.0))
    with pytest.raises(ConfigError, match=r"aligned cannot use teacher.signal full: set teacher.signal to topk"):
        signal_for(objective, TeacherConfig(serve=ServeConfig(model="tiny")))
    want = signal_for(objective, TeacherConfig(serve=ServeConfig(model="tiny"), topk=8))
    assert (want.level, want.top_k, want.temperature) == ("topk", 8, 1.0)
    with pytest.raises(TeacherError, match=r"aligned asks for the topk signal, but teacher tiny offers text"):
        check_offer(objective, TeacherInfo("tiny", 9, (Offer("text"),)), want)
