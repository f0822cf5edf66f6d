"""What the GPU engines share: a chunk's logits by matrix product, and the row kernels that each of them brings.

Shape suffixes: ``N`` tokens, ``n`` tokens of a chunk, ``D`` hidden, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` top-k.
What stands beyond V in a row is any number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from bbopd.reference_distill import Head
from bbopd.reference_vocabulary import refuse
from bbopd.types import Divergence

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHUNK_LOGITS = 2**27  # 512 MB of float32, enough rows to fill a GPU
ROW_ALIGNMENT = 16  # rows begin at multiples of 64 bytes, so that they are read 16 bytes at a time whatever the vocabulary
TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What hidden, weight, bias and a teacher's tensors may be; anything else is the reference's."""


@dataclass(frozen=True, slots=True)
class FullTeacherRows:
    """A whole distribution beside each row of the student's logits."""

    logits: Tensor  # [n, V or more] of any float type, each row contiguous
    statistics: Tensor  # [3, n] as in `Rows`
    signal: Tensor | None  # [n] bool: rows that may be read, or None for all
    divergence: Divergence
    mix: float  # beta of jsd, skew of the skewed ones


@dataclass(frozen=True, slots=True)
class Rows:
    """Logits [n, S] whose gradient by ``hidden @ weight.T`` is asked for, and the factors that make it."""

    logits: Tensor  # [n, S] float32
    V: int
    temperature: float
    statistics: Tensor  # [3, n] each row's maximum m, the logarithms of the sums of exp((z - m) / T) and of exp(z - m)
    gradient: Tensor | None  # [n, S] written, float32 or bfloat16; each row may begin where its logits do, which it then overwrites
    labels: Tensor | None  # [n, 1] int64, -1 for one that is not among these columns
    ce_grad: Tensor | None  # [n, 1] the factor of q - onehot(label), q at temperature 1
    kd_grad: Tensor | None = None  # [n, 1] the factor of the divergence's gradient; without a teacher that of q - onehot(id), q at T
    ids: Tensor | None = None  # [n, 1] int64 as labels, or None for q without onehot(id)
    softcap: float | None = None
    teacher: FullTeacherRows | None = None
    mean: Tensor | None = None  # [n] with a teacher, what `RowKernels.gradient` takes for the sum of qh over the vocabulary


class RowKernels(Protocol):
    """What an engine does with rows; nothing here waits for the GPU."""

    name: str  # what ``impl`` calls the engine
    emulated: bool  # on a CPU, in an emulation of the kernels

    def finish(self, logits: Tensor, bias: Tensor | None, inner: float | None, outer: float) -> None:
        """Logits [n, S] become ``outer * (z + bias)``, or with ``inner`` ``outer * tanh(inner * (z + bias))``, in place; bias [S]."""

    def statistics(
        self, logits: Tensor, V: int, temperature: float, *, at_one: bool = False, signal: Tensor | None = None, is_teacher: bool = False
    ) -> Tensor:
        """Each row's maximum m, its sum of exp((z - m) / T) and that of exp(z - m), [3, n]; the last is any number unless ``at_one``.

        A row of nothing but -inf gives (0, 0, 0). Of a teacher, +inf takes all the mass.
        """

    def divergence(self, rows: Rows) -> Tensor:
        """The divergence from a full teacher, its sum of qh (docs/objective.md; any number for forward KL), and how many log-probabilities
        reverse KL read as the floor, [3, n] float32: sums over these columns.

        The gradient is written too, where there is one, as of rows that have no other columns.
        """

    def gradient(self, rows: Rows) -> None:
        """Write the gradient of rows without a full teacher, or of those with a ``mean``."""

    def logprobs(
        self, logits: Logits, rows: slice, temperature: float, token_ids: Tensor | None, logsumexp: Tensor, sampled: Tensor
    ) -> None:
        """Of ``rows``, write the logsumexp [n] and, where there are ``token_ids`` [n], their log-probabilities [n]: NaN for an id that
        is outside the vocabulary."""

    def top_k(self, logits: Tensor, V: int, k: int) -> Tensor:
        """Ids of the ``k`` largest of each row, largest first, of equal ones the lower id first, [n, k]."""

    def selection_bytes(self, V: int, k: int) -> int:
        """The memory that `top_k` takes for a row."""


def check_tensors(kernels: RowKernels, hidden: Tensor, weight: Tensor, group: ProcessGroup | None = None) -> None:
    """Refuse what no kernel takes; on every rank of ``group`` what one has."""
    name, error = kernels.name, None
    if torch.float64 in (hidden.dtype, weight.dtype):
        error = f"impl={name!r} computes in float32, hidden is {hidden.dtype} and weight {weight.dtype}: use impl='reference'"
    elif hidden.device.type != "cuda" and not kernels.emulated:
        error = f"impl={name!r} runs on a GPU, hidden is on {hidden.device}: move it to 'cuda', or use impl='reference'"
    if error is not None:
        if group is not None:
            refuse(group, ValueError(error))  # the other ranks would wait for this one
        raise ValueError(error)


class Logits:
    """A head, and room for the logits of a chunk."""

    def __init__(self, kernels: RowKernels, head: Head, chunk: int) -> None:
        self.kernels, self.head, self.V = kernels, head, head.weight.shape[0]
        stride = max(-(-self.V // ROW_ALIGNMENT), 1) * ROW_ALIGNMENT
        self.buffer = torch.empty(chunk, stride, dtype=torch.float32, device=head.weight.device)
        self.bias_S = None if head.bias is None else torch.nn.functional.pad(head.bias.float(), (0, stride - self.V))
        # softcap(scale * z) is outer * tanh(inner * z), or without a cap outer * z
        self.inner = None if head.softcap is None else head.scale / head.softcap
        self.outer = head.scale if head.softcap is None else head.softcap

    def gradient(self, dtype: torch.dtype) -> Tensor:
        """Room for the gradient of a chunk, [chunk, S], in the logits' own memory: what is narrower leaves the end of each row unused."""
        return self.buffer.view(dtype)[:, : self.buffer.shape[1]]

    def multiply(self, rows: slice) -> Tensor:
        """``hidden @ weight.T`` of ``rows``, [n, S]."""
        z_nS = self.buffer[: rows.stop - rows.start]
        multiply(self.head.hidden[rows], self.head.weight.t(), z_nS[:, : self.V])
        return z_nS

    def write(self, rows: slice) -> Tensor:
        """The logits of ``rows``, [n, S]."""
        if self.V == 0:  # a rank without a token of its own: one that has no probability stands in
            return self.buffer[: rows.stop - rows.start].fill_(-torch.inf)
        z_nS = self.multiply(rows)
        if self.bias_S is not None or self.inner is not None or self.outer != 1.0:
            self.kernels.finish(z_nS, self.bias_S, self.inner, self.outer)
        return z_nS


def multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b`` into ``out``, summed in float32: on a GPU from bfloat16 or float16 as they are, where both are the same."""
    if a.shape[1] == 0:
        return out.zero_()
    if a.is_cpu:  # oneDNN's AMX product of rows with a stride reads what lies behind each row's end (its pull request 5603)
        a = a.contiguous()
    if a.dtype == b.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if not a.is_cpu and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    if out.dtype == torch.float32:
        return torch.mm(a.float(), b.float(), out=out)
    return out.copy_(a.float() @ b.float())
