"""The contestants of `linear_logprobs`: top-k, tail and the sampled token of every row, without gradients.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bbopd import linear_logprobs
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Step
from benchmarks.inputs import Inputs, draw

__all__ = ["CONTESTANTS", "FLOOR", "RESIZES", "draw", "scores_of"]

RESIZES = True


def floor(inputs: Inputs) -> Step:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    logits_NV = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

    def step() -> None:
        torch.mm(hidden, weight.T, out=logits_NV)

    return step


def torch_scores(hidden: Tensor, weight: Tensor, labels: Tensor, K: int) -> Tensor:
    """[N, K + 2]: the best log-probabilities, the tail's, the label's. In float64 it is the truth."""
    z_NV = hidden @ weight.T
    logprobs_NV = (z_NV if z_NV.dtype == torch.float64 else z_NV.float()).log_softmax(1)
    best = logprobs_NV.topk(K)
    log_tail_N = logprobs_NV.scatter(1, best.indices, -torch.inf).logsumexp(1)
    return torch.cat([best.values, log_tail_N[:, None], logprobs_NV.gather(1, labels[:, None])], dim=1)


def our_scores(hidden: Tensor, weight: Tensor, labels: Tensor, K: int, impl: str) -> Tensor:
    found = linear_logprobs(hidden, weight, token_ids=labels, top_k=K, impl=impl)
    assert found.topk_logprobs is not None
    assert found.log_tail is not None
    assert found.sampled is not None
    return torch.cat([found.topk_logprobs, found.log_tail[:, None], found.sampled[:, None]], dim=1)


def scores_of(score: Callable[..., Tensor], inputs: Inputs) -> Step:
    hidden, weight, labels, K = inputs.hidden.detach(), inputs.weight.detach(), inputs.labels, inputs.case.K

    def step() -> Tensor:
        with torch.no_grad():
            return score(hidden, weight, labels, K)

    return step


def compiled(inputs: Inputs) -> Step:
    return scores_of(torch.compile(torch_scores, dynamic=False), inputs)


def cpu_engine_missing(case: Case) -> str:
    """Why ``impl="cpu"`` cannot run, or an empty string."""
    try:
        linear_logprobs(torch.zeros(1, 1), torch.zeros(2, 1), top_k=1, impl="cpu")
    except ValueError as error:
        return str(error)
    return ""


PYTORCH = (
    Contestant("PyTorch eager", partial(scores_of, torch_scores), bytes_per_logit=16, note="matmul, log_softmax, topk"),
    Contestant("torch.compile", compiled, bytes_per_logit=16, is_compiled=True, is_peer=True, note="matmul, log_softmax, topk"),
)
FLOOR = Contestant("floor: one torch.mm(out=)", floor, bytes_per_logit=4, has_loss=False, note="logits alone")
CONTESTANTS = (
    FLOOR,
    Contestant("bbopd cpu", partial(scores_of, partial(our_scores, impl="cpu")), cpu_engine_missing),
    Contestant("bbopd reference", partial(scores_of, partial(our_scores, impl="reference"))),
    *PYTORCH,
)
