"""A skew for every sample: the formula in plain float64, and the loss of `mixed` with it, for any split into micro-batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

from bbopd.config_objective import ObjectiveConfig
from bbopd.objectives import make_objective
from bbopd.objectives.adaptive_skew import sample_leads, sample_skews
from bbopd.output_head import OutputHead
from bbopd.types import IGNORE_INDEX, DistillBatch
from tests.distill_oracle import compare, cut_rows, draw, logits_of, make_teacher, oracle
from tests.test_objectives import batch_of

V, LENGTHS = 13, (4, 3, 5, 2, 4, 6)
LABELLED = (True, False, True, False, False, True)
GAP = 0.02


def mixed(**options: float) -> ObjectiveConfig:
    sides = {"labelled": ("skew_forward_kl", 0.1), "rollouts": ("skew_reverse_kl", 0.3)}
    given = {side: {"name": name, "skew": skew, **options} for side, (name, skew) in sides.items()}
    return ObjectiveConfig.model_validate({"name": "mixed", "temperature": 1.0, "ramp": 0, **given})


def case(kind: str) -> tuple[torch.Tensor, torch.Tensor, DistillBatch, torch.Tensor]:
    """A student, its batch of six sequences, and the teacher's log-probabilities of everything."""
    N = sum(LENGTHS)
    hidden, weight, generator = draw(N, V, seed=7)
    log_p_NV = (1.2 * torch.randn(N, V, generator=generator, dtype=torch.float64)).log_softmax(1)
    valid = torch.ones(N, dtype=torch.bool)
    valid[5] = False
    ids = torch.randint(0, V, (N,), generator=generator)
    labels = torch.cat([torch.full((length,), 1 if mark else 0) for length, mark in zip(LENGTHS, LABELLED, strict=True)])
    labels = torch.where(labels == 1, ids, IGNORE_INDEX)
    teacher = make_teacher(kind, N, V, 1.0, generator, valid=valid, logits=log_p_NV)
    boundaries = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    own = log_p_NV.gather(1, ids[:, None])[:, 0]
    batch = replace(batch_of(teacher, labels), target_ids=ids, boundaries=boundaries, sampled_logprobs=None if kind == "full" else own)
    return hidden, weight, batch, log_p_NV


def skews_by_hand(z_NV: torch.Tensor, log_p_NV: torch.Tensor, batch: DistillBatch) -> list[float]:
    found, start = [], 0
    for length, is_labelled in zip(LENGTHS, LABELLED, strict=True):
        rows = [row for row in range(start, start + length) if bool(batch.teacher.valid[row])]
        start += length
        p, q = (torch.stack([of[row, batch.target_ids[row]] for row in rows]).mean().exp() for of in (log_p_NV, z_NV.log_softmax(1)))
        lead, skew = (float(p - q), 0.1) if is_labelled else (float(q - p), 0.3)
        found.append(skew if lead < 0 else min(skew, max(0.01, 1 - (1 - skew) * GAP / (lead + 1e-5))))
    return found


@pytest.mark.parametrize("kind", ["full", "topk", "candidates"])
def test_every_sample_has_its_own_skew_and_a_split_changes_nothing(kind):
    hidden, weight, batch, log_p_NV = case(kind)
    z_NV = logits_of(hidden, weight)
    skews = skews_by_hand(z_NV.detach(), log_p_NV, batch)
    assert len(set(skews)) >= 3, "the case has skews at either end, and between"
    counts = (float((batch.labels != IGNORE_INDEX).sum()), float(batch.teacher.valid.sum()))
    objective, head, expected, parts, start = make_objective(mixed(gap=GAP)), OutputHead(weight), 0.0, 0.0, 0
    for length, is_labelled, skew in zip(LENGTHS, LABELLED, skews, strict=True):
        rows = torch.arange(start, start + length)
        start += length
        expected = expected + oracle(
            z_NV[rows], cut_rows(batch.teacher, rows), batch.labels[rows], divergence=f"skew_{'forward' if is_labelled else 'reverse'}_kl",
            skew=skew, ce_weight=0.3, kd_weight=0.7, token_weight=batch.token_weight[rows], normalizer=counts,
        )[0]  # fmt: skip
        one = replace(
            batch, target_rows=torch.arange(length), boundaries=torch.tensor([0, length]), target_ids=batch.target_ids[rows],
            labels=batch.labels[rows], token_weight=batch.token_weight[rows], teacher=cut_rows(batch.teacher, rows),
            sampled_logprobs=None if batch.sampled_logprobs is None else batch.sampled_logprobs[rows],
        )  # fmt: skip
        parts = parts + objective.loss(hidden[rows], head, one, ce_weight=0.3, kd_weight=0.7, normalizer=counts).loss
    whole = objective.loss(hidden, head, batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
    compare(whole.loss, expected, (hidden, weight), 1e-9)
    again = objective.loss(hidden, head, batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
    compare(parts, again.loss, (hidden, weight), 1e-9)
    share = whole.metrics["share_labelled"] + whole.metrics["share_rollouts"]
    assert float(share) == pytest.approx(1.0)
    labelled = sum(skew * (length) for skew, length, mark in zip(skews, LENGTHS, LABELLED, strict=True) if mark)
    assert float(whole.metrics["skew_labelled"] * counts[1]) == pytest.approx(labelled)


def test_without_a_gap_or_far_apart_every_sample_has_the_side_s_own_skew():
    hidden, weight, batch, _ = case("full")
    one_for_all, each = (
        make_objective(mixed(**options)).loss(hidden, OutputHead(weight), batch, ce_weight=0.3, kd_weight=0.7, normalizer=None)
        for options in ({}, {"gap": 1e-9})
    )
    compare(each.loss, one_for_all.loss, (hidden, weight), 1e-12)
    assert "lead_labelled" not in one_for_all.metrics


def test_leads_are_differences_of_geometric_means():
    ahead, behind = torch.tensor([0.5, 0.125, 0.9, 0.3]).log(), torch.tensor([0.1, 0.1, 0.2, 0.6]).log()
    leads = sample_leads(ahead, behind, torch.tensor([True, True, False, True]), torch.tensor([0, 0, 1, 2]))
    assert leads.tolist() == pytest.approx([0.25 - 0.1, 0.0, -0.3])
    assert sample_skews(torch.tensor([0.5, 0.19, 0.1, -0.3]).double(), 0.1, 0.2).tolist() == pytest.approx(
        [0.1, 1 - 0.9 * 0.2 / 0.19001, 0.01, 0.1]
    )


def test_only_a_skewed_divergence_has_a_gap():
    with pytest.raises(ValidationError, match="gap gives every sample a skew, which jsd does not have"):
        ObjectiveConfig.model_validate({"name": "mixed", "labelled": {"name": "jsd", "gap": 0.1}})
