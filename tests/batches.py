"""Hand-made packed batches for tests of the trainer: random sequences, of which some are labelled and some are rollouts."""

from __future__ import annotations

import torch

from bbopd.types import DistillBatch, FullTeacher, OpTeacher, TopKTeacher

VOCABULARY = 320


def random_sequences(count: int, seed: int, longest: int = 24) -> list[tuple[torch.Tensor, int, bool]]:
    """Token ids, the length of the prompt in them, and whether the response is labelled (every second one)."""
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for index in range(count):
        length = int(torch.randint(6, longest, (), generator=generator))
        ids = torch.randint(0, VOCABULARY, (length,), generator=generator)
        sequences.append((ids, int(torch.randint(1, 5, (), generator=generator)), index % 2 == 0))
    return sequences


def pack(sequences: list[tuple[torch.Tensor, int, bool]], teacher_logits: list[torch.Tensor] | None, top_k: int = 0) -> DistillBatch:
    """One batch of ``sequences``; ``teacher_logits`` [L, V] for each, cut down to ``top_k`` ids where that is given."""
    lengths = [len(ids) for ids, _, _ in sequences]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    rows = [torch.arange(start + prompt - 1, start + n - 1) for start, n, (_, prompt, _) in zip(starts, lengths, sequences, strict=False)]
    targets = torch.cat([ids[prompt:] for ids, prompt, _ in sequences])
    labels = torch.cat([ids[prompt:] if labelled else torch.full_like(ids[prompt:], -100) for ids, prompt, labelled in sequences])
    return DistillBatch(
        input_ids=torch.cat([ids for ids, _, _ in sequences]),
        position_ids=torch.cat([torch.arange(length) for length in lengths]),
        boundaries=starts.int(),
        target_rows=torch.cat(rows),
        target_ids=targets,
        labels=labels,
        token_weight=torch.ones(len(targets)),
        teacher=None if teacher_logits is None else _teacher(torch.cat(teacher_logits), top_k),
        response_tokens=len(targets),
        rollout_tokens=sum(len(ids) - prompt for ids, prompt, labelled in sequences if not labelled),
    )


def random_teacher(sequences: list[tuple[torch.Tensor, int, bool]], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(len(ids) - prompt, VOCABULARY, generator=generator) for ids, prompt, _ in sequences]


def _teacher(logits: torch.Tensor, top_k: int) -> OpTeacher:
    if not top_k:
        return FullTeacher(logits=logits)
    logprobs, ids = logits.log_softmax(-1).topk(top_k, dim=-1)
    return TopKTeacher(ids=ids, logprobs=logprobs, log_tail=torch.log1p(-logprobs.exp().sum(-1)), temperature=1.0)
