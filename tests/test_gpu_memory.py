"""What `linear_distill` holds on a GPU at the size of its aim, counted tensor by tensor on "meta": nothing is computed, no GPU is needed.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bbopd import CandidateTeacher, FullTeacher, SampledTeacher, TopKTeacher, chunked_distill
from bbopd.cuda_rows import CudaRows
from bbopd.reference import linear_distill_with, register
from bbopd.types import DIVERGENCES, OpTeacher
from benchmarks.cases import ANCHOR
from tests.live_memory import LiveMemory

N, V, D = ANCHOR
K = 64
AIM = 1.2e9
"""Bytes beyond inputs, gradients, and float32 dW where the head is trained."""
CHUNK = 2048 * V * 4
"""The logits of a chunk."""


class NoLaunches:
    """The extension ``bbopd._cuda``, whose kernels have done all that they do to memory once they have taken their arguments."""

    def finish(self, **arguments: Any) -> None: ...
    def statistics(self, **arguments: Any) -> None: ...
    def distill(self, **arguments: Any) -> None: ...


empty = partial(torch.empty, device="meta")


def teacher_of(kind: str) -> OpTeacher | None:
    ids_NK = empty(N, K, dtype=torch.int32)
    if kind == "full":
        return FullTeacher(logits=empty(N, V, dtype=torch.float16), valid=empty(N, dtype=torch.bool))
    if kind == "full_hidden":
        return FullTeacher(hidden=empty(N, 2 * D, dtype=torch.bfloat16), weight=empty(V, 2 * D, dtype=torch.bfloat16))
    if kind == "topk":
        return TopKTeacher(ids_NK, empty(N, K, dtype=torch.float16), empty(N), temperature=2.0)
    if kind == "candidates":
        return CandidateTeacher(ids_NK, empty(N, K), empty(N), temperature=2.0)
    if kind == "sampled":
        token_ids = empty(N, dtype=torch.int64)
        return SampledTeacher(token_ids=token_ids, behavior_logprobs=empty(N), logprobs=empty(N), temperature=2.0)
    return None


@pytest.fixture(scope="module")
def op() -> Any:
    rows = CudaRows(NoLaunches(), emulated=True)
    run = partial(chunked_distill.run, rows)
    return register("bbopd_tests::linear_distill_meta", run, lambda dtype, _: chunked_distill.gradient_dtype(dtype))._init_fn


def peak_of(op: Any, kind: str, is_frozen: bool, bias: Tensor | None = None, **options: Any) -> int:
    """The most bytes that are alive during the op beyond its inputs; its gradients are among them."""
    hidden, weight = (empty(rows, D, dtype=torch.bfloat16) for rows in (N, V))
    labels = empty(N, dtype=torch.int64)
    live = LiveMemory()

    def counted(*arguments: Any) -> Any:
        with live, torch.no_grad():
            return op(*arguments)

    temperature = 1.0 if kind == "none" else 2.0
    hidden.requires_grad_()
    weight.requires_grad_(not is_frozen)
    linear_distill_with(counted, 0, hidden, weight, teacher_of(kind), labels, temperature=temperature, bias=bias, **options)
    return live.peak


@pytest.mark.parametrize("is_frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize(
    ("kind", "divergence"),
    [(kind, divergence) for kind in ("full", "full_hidden", "topk", "candidates") for divergence in DIVERGENCES]
    + [("sampled", "forward_kl"), ("none", "forward_kl")],
)
def test_memory_beyond_inputs_and_gradients(kind: str, divergence: str, is_frozen: bool, op: Any) -> None:
    beyond = peak_of(op, kind, is_frozen, divergence=divergence) - 2 * N * D - (0 if is_frozen else 4 * V * D)
    logits = 2 * CHUNK if kind == "full_hidden" else CHUNK  # the teacher's of a chunk, beside the student's
    assert logits < beyond <= logits + AIM - CHUNK


def test_a_bias_and_a_cap_cost_no_logits(op: Any) -> None:
    plain = peak_of(op, "topk", False)
    bias = empty(V, dtype=torch.bfloat16).requires_grad_()
    assert plain < peak_of(op, "topk", False, bias=bias, logit_scale=0.5, logit_softcap=30.0) < plain + 32 * V


def test_what_is_alive_is_counted_until_it_is_freed() -> None:
    before = torch.zeros(1000)
    with LiveMemory() as live:
        first = before + 1.0  # 4,000 bytes
        first.add_(before).view(10, 100).t()
        assert (live.now, live.peak) == (4000, 4000)
        second = torch.empty(10, dtype=torch.float64)
        assert (live.now, live.peak) == (4080, 4080)
        del first
        assert (live.now, live.peak) == (80, 4080)
        torch.mm(second[:, None], second[None], out=torch.empty(10, 10, dtype=torch.float64))
        assert (live.now, live.peak) == (80, 4080)
