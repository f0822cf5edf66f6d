"""What `linear_distill` must compute, in dense float64, row by row, from the formulas alone; autograd makes its gradients.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` ids of a support, ``C`` classes with the tail bucket.
"""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from bbopd import CandidateTeacher, FullTeacher, SampledTeacher, TopKTeacher
from bbopd.types import OpTeacher

FLOOR = -30.0


def logits_of(hidden, weight, bias=None, scale=1.0, softcap=None, vocab_size=None) -> Tensor:
    z_NV = hidden.double() @ weight.double().T
    z_NV = scale * (z_NV if bias is None else z_NV + bias.double())
    z_NV = z_NV if softcap is None else softcap * torch.tanh(z_NV / softcap)
    return z_NV[:, :vocab_size]


def bucket(log_q_V: Tensor, ids_K: Tensor) -> Tensor:
    """One row: the log-probabilities of the live ids, then of everything else."""
    live = [int(i) for i in ids_K if i >= 0]
    rest = [v for v in range(log_q_V.shape[0]) if v not in live]
    tail = log_q_V[rest].logsumexp(0) if rest else torch.tensor(-torch.inf, dtype=log_q_V.dtype)
    return torch.cat([log_q_V[live], tail[None]])


def mean_log_ratio(a: Tensor, log_a: Tensor, log_b: Tensor) -> Tensor:
    """sum a (log a - log b), where a = 0 contributes 0."""
    return torch.where(a > 0, a * (torch.where(a > 0, log_a, 0.0) - torch.where(a > 0, log_b, 0.0)), 0.0).sum()


def oracle_kd(log_p_C: Tensor, log_q_C: Tensor, name: str, beta: float, skew: float) -> Tensor:
    p, q = log_p_C.exp(), log_q_C.exp()
    if name == "forward_kl":
        return mean_log_ratio(p, log_p_C, log_q_C)
    if name == "reverse_kl":
        return mean_log_ratio(q, log_q_C, log_p_C.clamp(min=FLOOR))
    if name == "jsd":
        m = beta * p + (1 - beta) * q
        return beta * mean_log_ratio(p, log_p_C, m.log()) + (1 - beta) * mean_log_ratio(q, log_q_C, m.log())
    if name == "skew_forward_kl":
        return mean_log_ratio(p, log_p_C, (skew * p + (1 - skew) * q).log())
    return mean_log_ratio(q, log_q_C, (skew * q + (1 - skew) * p).log())


def oracle(z_NV: Tensor, teacher: OpTeacher | None, labels=None, *, temperature=1.0, ce_weight=0.5, kd_weight=0.5, divergence="forward_kl",
           beta=0.5, skew=0.1, t2_scaling=True, token_weight=None, normalizer=None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(loss, ce [N], kd [N]) from float64 logits, row by row."""
    N, V = z_NV.shape
    zero = torch.zeros((), dtype=torch.float64)
    labelled = [i for i in range(N) if labels is not None and labels[i] != -100]
    signal = [i for i in range(N) if teacher is not None and (teacher.valid is None or teacher.valid[i])]
    t2 = temperature**2 if t2_scaling else 1.0
    log_q_NV = (z_NV / temperature).log_softmax(1)
    ce = [-z_NV[i].log_softmax(0)[labels[i]] if i in labelled else zero for i in range(N)]
    kd = [zero] * N
    for i in signal:
        if isinstance(teacher, FullTeacher):
            t_V = (teacher.logits if teacher.logits is not None else logits_of(teacher.hidden, teacher.weight, teacher.bias,
                   teacher.logit_scale, teacher.logit_softcap))[i, :V].double()  # fmt: skip
            kd[i] = t2 * oracle_kd((t_V / temperature).log_softmax(0), log_q_NV[i], divergence, beta, skew)
        elif isinstance(teacher, SampledTeacher):
            given = teacher.advantages if teacher.advantages is not None else teacher.logprobs - teacher.behavior_logprobs
            advantage = given[i].double()
            ratio = (log_q_NV[i, teacher.token_ids[i]] - teacher.behavior_logprobs[i].double()).exp()
            kd[i] = -t2 * ratio * advantage
        else:
            live = teacher.ids[i] >= 0
            log_p_C = torch.cat([teacher.logprobs[i][live], teacher.log_tail[i : i + 1]]).double().log_softmax(0)
            kd[i] = t2 * oracle_kd(log_p_C, bucket(log_q_NV[i], teacher.ids[i]), divergence, beta, skew)
    ce_N, kd_N = torch.stack([*ce, zero])[:N], torch.stack([*kd, zero])[:N]
    weight_N = torch.ones(N, dtype=torch.float64) if token_weight is None else token_weight.double()
    ce_tokens, kd_tokens = normalizer if normalizer is not None else (max(len(labelled), 1), max(len(signal), 1))
    return ce_weight * (weight_N * ce_N).sum() / ce_tokens + kd_weight * (weight_N * kd_N).sum() / kd_tokens, ce_N, kd_N


# ---------------------------------------------------------------- inputs


def draw(N: int, V: int, D: int = 6, dtype=torch.float64, spread: float = 1.0, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, generator=generator, dtype=torch.float64) * spread / D**0.5).to(dtype).requires_grad_()
    return hidden, weight, generator


def make_teacher(
    kind: str, N: int, V: int, temperature: float, generator, dtype=torch.float64, K: int = 4, spread=2.0, valid=None, logits=None
) -> OpTeacher:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if kind == "full_hidden":
        return FullTeacher(hidden=noise(N, 5).to(dtype), weight=(noise(V, 5) * spread).to(dtype), bias=noise(V).to(dtype), logit_scale=0.7,
                           logit_softcap=9.0, valid=valid)  # fmt: skip
    t_NV = spread * noise(N, V) if logits is None else logits
    if kind == "full":
        return FullTeacher(logits=t_NV.to(dtype), valid=valid)
    log_p_NV = (t_NV / temperature).log_softmax(1)
    if kind in ("sampled", "advantages"):
        token_ids = torch.randint(0, V, (N,), generator=generator)
        logprobs = log_p_NV.gather(1, token_ids[:, None])[:, 0]
        behavior = (logprobs + 0.5 * noise(N)).to(dtype)
        known = {"logprobs": logprobs.to(dtype)} if kind == "sampled" else {"advantages": (2 * noise(N)).to(dtype)}
        return SampledTeacher(token_ids=token_ids, behavior_logprobs=behavior, temperature=temperature, valid=valid, **known)
    ids = log_p_NV.topk(K).indices if kind == "topk" else torch.stack([torch.randperm(V, generator=generator)[:K] for _ in range(N)])
    ids[::2, 1] = -1
    logprobs = log_p_NV.gather(1, ids.clamp(min=0))
    log_tail = torch.stack([bucket(log_p_NV[i], ids[i])[-1] for i in range(N)])
    make = TopKTeacher if kind == "topk" else CandidateTeacher
    return make(ids, logprobs.to(dtype), log_tail.to(dtype), temperature, valid)


def compare(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float) -> None:
    assert ours.item() == pytest.approx(theirs.item(), rel=tolerance, abs=tolerance)
    for a, b in zip(torch.autograd.grad(ours, inputs), torch.autograd.grad(theirs, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, check_dtype=False)


def cut_rows(teacher: OpTeacher, rows: slice) -> OpTeacher:
    """The teacher of a part of the tokens."""
    tensors = {field.name: getattr(teacher, field.name) for field in fields(teacher) if field.name not in ("weight", "bias")}
    return replace(teacher, **{name: tensor[rows] for name, tensor in tensors.items() if isinstance(tensor, Tensor)})
