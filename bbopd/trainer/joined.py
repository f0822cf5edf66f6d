"""The micro-batches that several ranks run at the same time as one batch, for a loss that all of them take part in.

Where the output head is split over the ranks by vocabulary, each multiplies the hidden states of all by its own rows. Shape suffixes as in
`DistillBatch`; ``n`` rows of one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from bbopd.types import CandidateTeacher, DistillBatch, FullTeacher, TopKTeacher


@dataclass(frozen=True, slots=True, eq=False)
class JoinedBatch(DistillBatch):
    """Batches of all ranks laid end to end, in the order of ranks."""

    sequences: Sequence[int] = ()  # of each rank
    rows: Sequence[int] = ()  # of each rank, of the N

    def own(self, rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Ids, positions and boundaries of the sequences of ``rank``, and its target rows in them; two ids and no row where it has none."""
        first, end = _span(self.sequences, rank)
        row, row_end = _span(self.rows, rank)
        if first == end:
            device = self.input_ids.device
            ids_P = torch.zeros(2, dtype=torch.int64, device=device)
            return ids_P, torch.arange(2, device=device), torch.tensor([0, 2], dtype=torch.int32), self.target_rows[:0]
        start, stop = int(self.boundaries[first]), int(self.boundaries[end])
        rows_n = self.target_rows[row:row_end] - start
        return self.input_ids[start:stop], self.position_ids[start:stop], self.boundaries[first : end + 1] - start, rows_n


def join_batches(batches: Sequence[DistillBatch], ranks: int) -> JoinedBatch:
    """``batches``, one of each of the first ranks, as one; without what no objective reads that takes a split head."""
    starts = [0, *accumulate(batch.packed_tokens for batch in batches)]
    empty = [0] * (ranks - len(batches))
    boundaries = [batch.boundaries[1:] + start for batch, start in zip(batches, starts, strict=False)]
    return JoinedBatch(
        input_ids=torch.cat([batch.input_ids for batch in batches]),
        position_ids=torch.cat([batch.position_ids for batch in batches]),
        boundaries=torch.cat([batches[0].boundaries[:1], *boundaries]),
        target_rows=torch.cat([batch.target_rows + start for batch, start in zip(batches, starts, strict=False)]),
        target_ids=torch.cat([batch.target_ids for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        token_weight=torch.cat([batch.token_weight for batch in batches]),
        teacher=_join_teachers(batches),
        response_tokens=sum(batch.response_tokens for batch in batches),
        rollout_tokens=sum(batch.rollout_tokens for batch in batches),
        sequences=[len(batch.boundaries) - 1 for batch in batches] + empty,
        rows=[batch.response_tokens for batch in batches] + empty,
    )


def with_columns(batch: JoinedBatch, first: int, end: int) -> JoinedBatch:
    """The same with a full teacher's logits of the ids from ``first`` to ``end`` alone: those of a rank's own rows of the head."""
    if not isinstance(batch.teacher, FullTeacher):
        return batch
    assert batch.teacher.logits is not None, "assembled batches have logits"
    return replace(batch, teacher=replace(batch.teacher, logits=batch.teacher.logits[:, first:end]))


def gather_rows(rows_nD: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The rows of all ranks, [N, D], ``counts`` of each. Every rank must make the gradient of all of them; each takes that of its own."""
    rows_ND: Tensor = _GatherRows.apply(rows_nD, counts, group)
    return rows_ND


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_nD: Tensor, counts: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.span = _span(counts, group.rank())
        padded = rows_nD.new_zeros(max(counts), rows_nD.shape[1])
        padded[: len(rows_nD)] = rows_nD
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded, group)
        return torch.cat([one[:count] for one, count in zip(found, counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        first, end = ctx.span
        return gradient_ND[first:end], None, None


def _span(counts: Sequence[int], rank: int) -> tuple[int, int]:
    first = sum(counts[:rank])
    return first, first + counts[rank]


def _join_teachers(batches: Sequence[DistillBatch]) -> FullTeacher | TopKTeacher | CandidateTeacher | None:
    """One teacher of all rows; those of a batch without a signal are not valid."""
    some = [batch.teacher for batch in batches if batch.teacher is not None]
    if not some:
        return None
    kind = type(some[0])
    assert kind in (FullTeacher, TopKTeacher, CandidateTeacher), "the configuration has refused the others"
    assert all(type(teacher) is kind for teacher in some), "a run asks for one signal"
    first = cast("FullTeacher | TopKTeacher | CandidateTeacher", some[0])
    names = [field.name for field in fields(first) if isinstance(getattr(first, field.name), Tensor) and field.name != "valid"]
    joined: dict[str, Any] = {
        name: _join([getattr(batch.teacher, name, None) for batch in batches], batches, _EMPTY.get(name, 0)) for name in names
    }
    valid = [
        torch.full((batch.response_tokens,), batch.teacher is not None)
        if (given := getattr(batch.teacher, "valid", None)) is None
        else given
        for batch in batches
    ]
    return replace(first, **joined, valid=torch.cat(valid))


_EMPTY = {"ids": -1, "logprobs": -torch.inf}


def _join(values: Sequence[Tensor | None], batches: Sequence[DistillBatch], empty: float) -> Tensor:
    """One tensor [N, ...] of ``values`` [n, ...], as wide as the widest; ``empty`` where there is nothing."""
    some = [value for value in values if value is not None]
    width = [max(value.shape[1] for value in some)] if some[0].dim() == 2 else []
    out = some[0].new_full((sum(batch.response_tokens for batch in batches), *width), empty)
    row = 0
    for value, batch in zip(values, batches, strict=True):
        if value is not None:
            part = out[row : row + len(value)]
            (part[:, : value.shape[1]] if width else part).copy_(value)
        row += batch.response_tokens
    return out
