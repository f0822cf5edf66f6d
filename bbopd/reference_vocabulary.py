"""The vocabulary that a process works on: the whole of it, or the rows that a rank of a group holds.

The mathematics is written once, for columns that may be a part: what it reduces over the vocabulary goes through one of these
objects, which leaves it as it is or adds it up over the ranks. Shape suffixes: ``N`` tokens, ``n`` rows of a block, ``V`` columns that
are here, ``K`` ids of a row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_RECORD_BYTES = 4096  # what each rank tells the others at a time, in JSON
_ERROR_LETTERS = 600  # of an error that they are told: JSON may write six bytes for one
_PROJECTION_TOLERANCE = 0.01  # of a tensor's norm: above rounding to bfloat16, far below another batch


class Whole:
    """All of the vocabulary is here: nothing to reduce."""

    widest: int | None = None
    """The most columns of a rank, where there are several: all go through the tokens in steps of the same size."""

    def max(self, *locals_n1: Tensor) -> Sequence[Tensor]:
        """The largest of each row's, over all ranks."""
        return locals_n1

    def sum(self, *locals_nK: Tensor | None) -> Sequence[Any]:
        """Sums over all ranks, of what is there."""
        return locals_nK

    def sum_in_place(self, tensor: Tensor) -> None:
        """Add up a tensor over all ranks."""

    def gather(self, z_nV: Tensor, ids_nK: Tensor) -> Tensor:
        """Values at ``ids_nK``, to be added up: 0 where another rank has the id."""
        return z_nV.gather(1, ids_nK)

    def columns_of(self, ids_nK: Tensor) -> Tensor:
        """Where ids are among the columns here; -1 for one of another rank."""
        return ids_nK

    def put(self, z_nV: Tensor, ids_nK: Tensor, values: Tensor | float) -> None:
        """Write ``values`` [n, K] at those of ``ids_nK`` that are here; an id that is there twice has equal ones."""
        z_nV.scatter_(1, ids_nK, values)

    def add(self, z_nV: Tensor, ids_n1: Tensor, values_n1: Tensor) -> None:
        """Add ``values_n1`` at those of ``ids_n1`` that are here."""
        z_nV.scatter_(1, ids_n1, z_nV.gather(1, ids_n1) + values_n1)

    def check(self, values: Callable[[], None], same: Mapping[str, Tensor | None]) -> None:
        """Call ``values``, which raises what is wrong with them; ``same`` are tensors that all ranks share."""
        values()


WHOLE = Whole()


@dataclass(frozen=True, slots=True)
class Shard(Whole):
    """The rows that this rank of ``group`` holds: ``columns`` in use, from the id ``first`` on.

    A rank without any stands in with one logit of -inf, which no id points at.
    """

    group: ProcessGroup
    first: int
    columns: int
    total: int  # of the whole vocabulary in use
    widest: int

    @classmethod
    def agree(cls, group_name: str, rows: int, teacher_rows: int | None, vocab_size: int, terms: Mapping[str, Any]) -> Shard:
        """Exchange with the other ranks what each passed: ``rows`` of weight and of the teacher, ``vocab_size`` (0 for all), and
        ``terms`` that must be the same. Every rank raises the same ValueError where they do not fit."""
        from torch.distributed.distributed_c10d import _resolve_process_group

        group = _resolve_process_group(group_name)  # type: ignore[arg-type]
        record = {"rows": rows, "teacher_rows": teacher_rows, "terms": {"vocab_size": vocab_size or None, **terms}}
        records = exchange(group, record)
        _check_terms([record["terms"] for record in records])
        sizes = [record["rows"] for record in records]
        total = vocab_size or sum(sizes)
        if not 1 <= total <= sum(sizes):
            raise ValueError(
                f"vocab_size is {total}, but the ranks' weights have {sum(sizes)} rows together, {sizes}: give a number from 1 to that"
            )
        firsts = [sum(sizes[:rank]) for rank in range(len(sizes))]
        columns = [min(max(total - first, 0), size) for first, size in zip(firsts, sizes, strict=True)]
        for rank, record in enumerate(records):
            found, size = record["teacher_rows"], sizes[rank]
            is_padding_next = firsts[rank] + size >= total
            if found is not None and found != size and not (is_padding_next and found >= columns[rank]):
                raise ValueError(
                    f"the teacher has {found} entries of the vocabulary on rank {rank} of the group, the student {size}, from id "
                    f"{firsts[rank]} on: split both at the same ids; only padding from vocab_size ({total}) on may differ"
                )
        rank = group.rank()
        return cls(group, firsts[rank], columns[rank], total, max(columns))

    def max(self, *locals_n1: Tensor) -> Sequence[Tensor]:
        together = torch.cat(locals_n1, 1)
        torch.distributed.all_reduce(together, torch.distributed.ReduceOp.MAX, self.group)
        return together.split(1, 1)

    def sum(self, *locals_nK: Tensor | None) -> Sequence[Any]:
        present = [local if local.dim() == 2 else local[:, None] for local in locals_nK if local is not None]
        if not present:
            return locals_nK
        together = torch.cat(present, 1)  # an integer count becomes a float, exact below 2^24
        self.sum_in_place(together)
        parts = iter(together.split([local.shape[1] for local in present], 1))
        return [None if local is None else next(parts).view(local.shape).to(local.dtype) for local in locals_nK]

    def sum_in_place(self, tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.SUM, self.group)

    def gather(self, z_nV: Tensor, ids_nK: Tensor) -> Tensor:
        column_nK, here_nK = self._places_of(ids_nK)
        return z_nV.gather(1, column_nK).masked_fill(~here_nK, 0.0)

    def columns_of(self, ids_nK: Tensor) -> Tensor:
        column_nK, here_nK = self._places_of(ids_nK)
        return column_nK.masked_fill(~here_nK, -1)

    def put(self, z_nV: Tensor, ids_nK: Tensor, values: Tensor | float) -> None:
        column_nK, here_nK = self._places_of(ids_nK)
        # an id of another rank writes what one of this rank's does; in a row without any, what column 0 holds
        twin_n1 = here_nK.to(torch.uint8).argmax(1, keepdim=True)
        column_nK = torch.where(here_nK, column_nK, column_nK.gather(1, twin_n1))
        if isinstance(values, Tensor):
            values = torch.where(here_nK, values, values.gather(1, twin_n1))
        z_nV.scatter_(1, column_nK, torch.where(here_nK.gather(1, twin_n1), values, z_nV[:, :1]).expand_as(column_nK))

    def add(self, z_nV: Tensor, ids_n1: Tensor, values_n1: Tensor) -> None:
        column_n1, here_n1 = self._places_of(ids_n1)
        z_nV.scatter_(1, column_n1, z_nV.gather(1, column_n1) + values_n1.masked_fill(~here_n1, 0.0))

    def _places_of(self, ids_nK: Tensor) -> tuple[Tensor, Tensor]:
        """Where ids are here, and whether they are; column 0 where not."""
        column_nK = ids_nK - self.first
        here_nK = (column_nK >= 0) & (column_nK < self.columns)
        return column_nK.masked_fill(~here_nK, 0), here_nK

    def check(self, values: Callable[[], None], same: Mapping[str, Tensor | None]) -> None:
        """What one rank finds wrong is raised on every one, and so is a tensor of ``same`` that differs."""
        try:
            values()
        except ValueError as error:
            refuse(self.group, error)
            raise
        prints = {name: _fingerprint(tensor) for name, tensor in same.items() if tensor is not None}
        first, *others = [record["prints"] for record in exchange(self.group, {"prints": prints})]
        for rank, other in enumerate(others, 1):
            for name in prints:
                if not _match(first[name], other[name]):
                    raise ValueError(
                        f"{name} of rank {rank} of the group differs from that of rank 0: group splits the vocabulary, so all its ranks "
                        "pass the same tokens; ranks with tokens of their own pass group=None and the normalizer of all"
                    )


def exchange(group: ProcessGroup, record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The records of all ranks, in their order; raises on every rank what `refuse` told on one."""
    from torch.distributed.distributed_c10d import _get_object_coll_device

    device = _get_object_coll_device(group)  # a CPU where the group reaches one: a GPU's queue is then not waited for
    told = json.dumps(record).encode().ljust(_RECORD_BYTES)
    assert len(told) == _RECORD_BYTES
    ours = torch.frombuffer(bytearray(told), dtype=torch.uint8).to(device)
    theirs = [torch.empty_like(ours) for _ in range(group.size())]
    torch.distributed.all_gather(theirs, ours, group)
    records = [json.loads(bytes(other.cpu().numpy())) for other in theirs]
    for rank, other in enumerate(records):
        if "error" in other and "error" not in record:
            raise ValueError(f"rank {rank} of the group refused its arguments: {other['error']}")
    return records


def refuse(group: ProcessGroup, error: Exception) -> None:
    """Tell the other ranks, who are or will be in `exchange`, what this one is about to raise."""
    exchange(group, {"error": str(error)[:_ERROR_LETTERS]})


def describe(shared: Mapping[str, Tensor | None], own: Mapping[str, Tensor | None]) -> dict[str, str | None]:
    """What tensors of all ranks have in common: ``shared`` ones dtype and shape, a rank's ``own`` rows their dtype."""
    described = {name: None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}" for name, tensor in shared.items()}
    return described | {name: None if tensor is None else f"{tensor.dtype}" for name, tensor in own.items()}


def _check_terms(terms: Sequence[Mapping[str, Any]]) -> None:
    for rank, other in enumerate(terms[1:], 1):
        for name, value in terms[0].items():
            if other[name] != value:
                raise ValueError(
                    f"{name} is {other[name]} on rank {rank} of the group and {value} on rank 0: all its ranks pass the same, but for "
                    "their own rows of weight, bias and the teacher's"
                )


def _fingerprint(tensor: Tensor) -> list[float]:
    """A number of a tensor and how far another may be from it, at most: integers add up exactly, floats are projected on one direction."""
    if not tensor.is_floating_point():
        places = torch.arange(tensor.numel(), device=tensor.device).view(tensor.shape)
        return [int((tensor.long() * (2 * places + 1)).sum()), 0]
    values = tensor.float().nan_to_num(0.0, 1e4, -1e4)
    values = values if values.dim() == 2 else values[:, None]
    down, across = (torch.arange(size, device=tensor.device, dtype=torch.float32).mul_(2.4).cos_() for size in values.shape)
    tolerance = _PROJECTION_TOLERANCE if tensor.numel() > 2 else 0.0  # two numbers are not rounded on their way
    return [float(down.dot(values @ across)), tolerance * float(values.norm())]


def _match(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    return abs(ours[0] - theirs[0]) <= max(ours[1], theirs[1])
