"""The CUDA kernels as `bbopd.chunked_logits.RowKernels`: tensors to launches, a block of threads for each row.

Shape suffixes: ``n`` rows of a chunk, ``V`` vocabulary in use, ``S`` a row's stride in memory, ``K`` top-k.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbopd.chunked_logits import TYPES, Logits, Rows
from bbopd.types import DIVERGENCES


class CudaRows:
    """Launches by ``kernels``: the extension ``bbopd._cuda``, or an emulation of it on tensors of a CPU."""

    name = "cuda"

    def __init__(self, kernels: Any, emulated: bool = False) -> None:
        self.kernels, self.emulated = kernels, emulated

    def finish(self, logits: Tensor, bias: Tensor | None, inner: float | None, outer: float) -> None:
        # the row to its end, as a bias is as long
        self.kernels.finish(
            n=logits.shape[0],
            V=logits.shape[1],
            logits=_matrix(logits),
            finish=(_address(bias), inner, outer),
            place=_place(logits),
        )

    def statistics(
        self, logits: Tensor, V: int, temperature: float, *, at_one: bool = False, signal: Tensor | None = None, is_teacher: bool = False
    ) -> Tensor:
        statistics_3n = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
        self.kernels.statistics(
            n=logits.shape[0],
            V=V,
            logits=_matrix(logits),
            signal=_address(signal),
            is_teacher=is_teacher,
            at_one=at_one and temperature != 1.0,
            inverse_temperature=1.0 / temperature,
            statistics=_address(statistics_3n),
            place=_place(logits),
        )
        return statistics_3n

    def divergence(self, rows: Rows) -> Tensor:
        shares_3n = torch.empty(3, rows.logits.shape[0], dtype=torch.float32, device=rows.logits.device)
        self._distill(rows, shares_3n)
        return shares_3n

    def gradient(self, rows: Rows) -> None:
        self._distill(rows, None)

    def _distill(self, rows: Rows, shares_3n: Tensor | None) -> None:
        full, n = rows.teacher, rows.logits.shape[0]
        statistics_3n = rows.statistics.contiguous()
        self.kernels.distill(
            n=n,
            V=rows.V,
            logits=_matrix(rows.logits),
            gradient=_matrix(rows.gradient),
            statistics=_address(statistics_3n),
            labels=_address(rows.labels),
            ce_grad=_address(rows.ce_grad),
            kd_grad=_address(rows.kd_grad),
            ids=_address(rows.ids),
            inverse_temperature=1.0 / rows.temperature,
            inverse_cap=0.0 if rows.softcap is None else 1.0 / rows.softcap,
            teacher=_matrix(None if full is None else full.logits),
            teacher_statistics=_address(None if full is None else full.statistics),
            signal=_address(None if full is None else full.signal),
            divergence=0 if full is None else DIVERGENCES.index(full.divergence),
            beta=0.0 if full is None else full.mix,
            skew=0.0 if full is None else full.mix,
            mean=_address(rows.mean),
            shares=_address(shares_3n),
            place=_place(rows.logits),
        )

    def logprobs(
        self, logits: Logits, rows: slice, temperature: float, token_ids: Tensor | None, logsumexp: Tensor, sampled: Tensor
    ) -> None:
        z_nS = logits.multiply(rows)
        token_ids = None if token_ids is None else token_ids.long()
        self.kernels.logprobs(
            n=z_nS.shape[0],
            V=logits.V,
            logits=_matrix(z_nS),
            finish=(_address(logits.bias_S), logits.inner, logits.outer / temperature),
            token_ids=_address(token_ids),
            logsumexp=_address(logsumexp),
            sampled=_address(sampled),
            place=_place(z_nS),
        )

    def top_k(self, logits: Tensor, V: int, k: int) -> Tensor:
        keys_nK = torch.empty(logits.shape[0], k, dtype=torch.int64, device=logits.device)
        self.kernels.top_k(n=logits.shape[0], V=V, K=k, logits=_matrix(logits), keys=_address(keys_nK), place=_place(logits))
        return ~keys_nK.sort(1, descending=True).values & 0xFFFFFFFF  # no two keys are equal: there is one order

    def selection_bytes(self, V: int, k: int) -> int:
        return 8 * k


def _address(tensor: Tensor | None) -> int:
    """Where a tensor begins, 0 for none."""
    assert tensor is None or tensor.is_contiguous()
    return 0 if tensor is None else tensor.data_ptr()


def _matrix(tensor: Tensor | None) -> tuple[int, int, int, int] | None:
    """Address, stride, width and type of rows that are each contiguous."""
    if tensor is None:
        return None
    assert tensor.stride(1) == 1
    return tensor.data_ptr(), tensor.stride(0), tensor.shape[1], TYPES.index(tensor.dtype)


def _place(tensor: Tensor) -> tuple[int, int]:
    """The device, and the stream on which torch works there."""
    if tensor.device.type != "cuda":
        return -1, 0
    return tensor.device.index, torch.cuda.current_stream(tensor.device).cuda_stream
