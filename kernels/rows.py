"""The Triton kernels as `bbopd.chunked_logits.RowKernels`: tensors to launches, one program a row.

Shape suffixes: ``n`` rows of a chunk, ``V`` vocabulary in use, ``S`` a row's stride in memory.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from bbopd.chunked_logits import Logits, Rows
from bbopd.kernels import logprobs_rows
from bbopd.kernels.distill_rows import row_divergence, row_gradient
from bbopd.kernels.logits import INTERPRETED, LAUNCH, finish_logits, row_statistics

__all__ = ["INTERPRETED", "TritonRows"]


class TritonRows:
    name = "triton"
    emulated = INTERPRETED

    def finish(self, logits: Tensor, bias: Tensor | None, inner: float | None, outer: float) -> None:
        finish_logits[(logits.shape[0],)](logits, bias, logits.stride(0), inner, outer, **LAUNCH)

    def statistics(
        self, logits: Tensor, V: int, temperature: float, *, at_one: bool = False, signal: Tensor | None = None, is_teacher: bool = False
    ) -> Tensor:
        statistics_3n = torch.empty(3, logits.shape[0], dtype=torch.float32, device=logits.device)
        row_statistics[(logits.shape[0],)](
            logits,
            signal,
            statistics_3n,
            V,
            logits.shape[1],
            logits.stride(0),
            _inverse(temperature),
            AT_ONE=at_one and temperature != 1.0,
            IS_TEACHER=is_teacher,
            **LAUNCH,
        )
        if temperature == 1.0:
            statistics_3n[2] = statistics_3n[1]
        return statistics_3n

    def divergence(self, rows: Rows) -> Tensor:
        full, n = rows.teacher, rows.logits.shape[0]
        assert full is not None
        shares_3n = torch.empty(3, n, dtype=torch.float32, device=rows.logits.device)
        row_divergence[(n,)](
            rows.logits,
            full.logits,
            full.signal,
            rows.statistics,
            full.statistics,
            shares_3n,
            rows.V,
            rows.logits.stride(0),
            full.logits.stride(0),
            full.logits.shape[1],
            _inverse(rows.temperature),
            full.mix,
            DIVERGENCE=full.divergence,
            **LAUNCH,
        )
        if rows.gradient is not None:
            self._gradient(rows, None if full.divergence == "forward_kl" else shares_3n[1])
        return shares_3n

    def gradient(self, rows: Rows) -> None:
        self._gradient(rows, rows.mean)

    def _gradient(self, rows: Rows, mean: Tensor | None) -> None:
        full = rows.teacher
        row_gradient[(rows.logits.shape[0],)](
            rows.logits,
            rows.gradient,
            None if full is None else full.logits,
            None if full is None else full.signal,
            rows.statistics,
            None if full is None else full.statistics,
            mean,
            rows.ce_grad,
            rows.kd_grad,
            rows.labels,
            rows.ids,
            rows.V,
            rows.logits.stride(0),
            0 if rows.gradient is None else rows.gradient.stride(0),
            0 if full is None else full.logits.stride(0),
            0 if full is None else full.logits.shape[1],
            _inverse(rows.temperature),
            None if rows.softcap is None else 1.0 / rows.softcap,
            0.0 if full is None else full.mix,
            DIVERGENCE="forward_kl" if full is None else full.divergence,
            **LAUNCH,
        )

    def logprobs(
        self, logits: Logits, rows: slice, temperature: float, token_ids: Tensor | None, logsumexp: Tensor, sampled: Tensor
    ) -> None:
        z_nS = logits.multiply(rows)
        logprobs_rows.row_logprobs[(z_nS.shape[0],)](
            z_nS,
            logits.bias_S,
            token_ids,
            logsumexp,
            sampled,
            logits.V,
            z_nS.stride(0),
            logits.inner,
            logits.outer / temperature,
            BLOCK=logprobs_rows.BLOCK,
            num_warps=logprobs_rows.WARPS,
            enable_fp_fusion=True,  # its default differs between Triton's versions
        )

    def top_k(self, logits: Tensor, V: int, k: int) -> Tensor:
        tiles, kept = _tiles(V, k)
        keys = torch.empty(logits.shape[0], tiles, kept, dtype=torch.int64, device=logits.device)
        logprobs_rows.tile_top_k[keys.shape[:2]](
            logits, keys, V, logits.stride(0), kept, BLOCK=logprobs_rows.BLOCK, num_warps=logprobs_rows.WARPS
        )
        return ~torch.topk(keys.flatten(1), k).values & 0xFFFFFFFF  # no two keys are equal: there is one answer

    def selection_bytes(self, V: int, k: int) -> int:
        tiles, kept = _tiles(V, k)
        return 8 * tiles * kept


def _inverse(temperature: float) -> float | None:
    return None if temperature == 1.0 else 1.0 / temperature


def _tiles(V: int, k: int) -> tuple[int, int]:
    """How many tiles a row has, and how many of its logits each may give."""
    return triton.cdiv(V, logprobs_rows.BLOCK), min(k, logprobs_rows.BLOCK)
