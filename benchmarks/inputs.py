"""The tensors of one case: a student's hidden states and head, and a teacher that differs from it by a known amount.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bbopd import FullTeacher, SampledTeacher, TopKTeacher
from bbopd.types import OpTeacher
from benchmarks.cases import Case

LOGIT_SPREAD = 2.5  # standard deviation of the logits, as language models have it
ROWS = 128  # of teacher logits at a time


@dataclass(slots=True)
class Inputs:
    """``teacher_weight`` [V, D] with the student's hidden states is the teacher itself; ``teacher`` is what is known of it."""

    case: Case
    hidden: Tensor  # [N, D]
    weight: Tensor  # [V, D]
    labels: Tensor  # [N]
    teacher_weight: Tensor | None
    teacher: OpTeacher | None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return (self.hidden, self.weight)

    def drop_gradients(self) -> None:
        """As ``optimizer.zero_grad(set_to_none=True)`` does after each step."""
        for leaf in self.leaves:
            leaf.grad = None


def draw(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of a case, the same for the same seed."""
    generator = torch.Generator(case.device).manual_seed(seed)
    dtype, device = getattr(torch, case.dtype), case.device
    hidden = torch.randn(case.N, case.D, generator=generator, device=device).to(dtype)
    weight = torch.randn(case.V, case.D, generator=generator, device=device).mul_(LOGIT_SPREAD / case.D**0.5).to(dtype)
    labels = torch.randint(0, case.V, (case.N,), generator=generator, device=device)
    teacher_weight = teacher = None
    if case.teacher != "none":
        noise = torch.randn(case.V, case.D, generator=generator, device=device).mul_(case.teacher_noise / case.D**0.5)
        teacher_weight = noise.add_(weight).to(dtype)
        del noise
        if case.teacher == "sampled":
            teacher = sampled_teacher(case, hidden, weight, teacher_weight, generator)
        else:
            teacher = make_teacher(case, hidden, teacher_weight)
    return Inputs(case, hidden.requires_grad_(), weight.requires_grad_(not case.is_head_frozen), labels, teacher_weight, teacher)


@torch.no_grad()
def make_teacher(case: Case, hidden: Tensor, weight: Tensor) -> OpTeacher:
    """What a teacher sends: float16 logits less their maximum, hidden states with its head, or its top K with the exact tail."""
    if case.teacher == "full_hidden":
        return FullTeacher(hidden=hidden.detach(), weight=weight)
    if case.teacher == "full":
        logits = torch.empty(case.N, case.V, dtype=torch.float16, device=hidden.device)
        for start in range(0, case.N, ROWS):
            rows = _logits(hidden[start : start + ROWS], weight)
            logits[start : start + ROWS] = rows - rows.amax(1, keepdim=True)
        return FullTeacher(logits=logits)
    parts = [_topk(_logits(rows, weight) / case.temperature, case.K) for rows in hidden.split(ROWS)]
    ids, logprobs, log_tail = (torch.cat(part) for part in zip(*parts, strict=True))
    return TopKTeacher(ids, logprobs, log_tail, case.temperature)


@torch.no_grad()
def sampled_teacher(case: Case, hidden: Tensor, student: Tensor, teacher: Tensor, generator: torch.Generator) -> SampledTeacher:
    """One token of the student's own at each place, with the log-probability that each of the two heads gives it."""
    parts = []
    for rows in hidden.split(ROWS):
        log_q, log_p = ((_logits(rows, weight) / case.temperature).log_softmax(1) for weight in (student, teacher))
        ids = torch.multinomial(log_q.exp(), 1, generator=generator)
        parts.append((ids[:, 0], log_p.gather(1, ids)[:, 0], log_q.gather(1, ids)[:, 0]))
    ids, logprobs, behavior = (torch.cat(part) for part in zip(*parts, strict=True))
    return SampledTeacher(token_ids=ids, behavior_logprobs=behavior, logprobs=logprobs, temperature=case.temperature)


def _logits(rows: Tensor, weight: Tensor) -> Tensor:
    if rows.is_cuda and rows.dtype != torch.float32:
        return torch.mm(rows, weight.T, out_dtype=torch.float32)
    return (rows @ weight.T).float() if rows.dtype != torch.bfloat16 else _bfloat16_logits(rows, weight)


def _bfloat16_logits(rows: Tensor, weight: Tensor) -> Tensor:
    """In float32, a slice of the vocabulary at a time: rounded logits would be another teacher than the peers' own."""
    return torch.cat([rows.float() @ part.float().T for part in weight.split(16384)], dim=1)


def _topk(logits: Tensor, K: int) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.log_softmax(1)
    best = logprobs.topk(K)
    log_tail = logprobs.scatter(1, best.indices, -torch.inf).logsumexp(1)
    return best.indices, best.values, log_tail
