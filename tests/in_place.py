"""Gradients that an engine's row kernels write over the logits, and the same ones written elsewhere.

Shape suffixes: ``n`` rows, ``V`` vocabulary, ``S`` a row's stride in memory.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bbopd.chunked_logits import FullTeacherRows, RowKernels, Rows
from bbopd.types import DIVERGENCES

n, V, S = 3, 9001, 9008  # several blocks of columns, the last one cut short
KINDS = (*(f"full {divergence}" for divergence in DIVERGENCES), "full with a mean", "a sampled token", "cross-entropy")


def gradients(kernels: RowKernels, kind: str, dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The gradient [n, V] of the same rows in memory of its own, and over the logits."""
    generator = torch.Generator().manual_seed(V)
    z_nS, teacher_nS = (3.0 * torch.randn(2, n, S, generator=generator)).to(device)
    labels_n1 = torch.randint(0, V, (n, 1), generator=generator).to(device)
    statistics_3n, teacher_3n = (kernels.statistics(logits, V, 2.0, at_one=True) for logits in (z_nS, teacher_nS))
    statistics_3n[1:].log_()
    teacher_3n[1:].log_()
    ones_n1 = torch.ones(n, 1, device=device)
    given = Rows(z_nS, V, 2.0, statistics_3n, torch.empty(n, S, dtype=dtype, device=device), labels_n1, ones_n1, softcap=30.0)
    if kind == "a sampled token":
        given = replace(given, kd_grad=-ones_n1, ids=labels_n1.flip(0).contiguous())
    if kind.startswith("full"):
        divergence = "jsd" if kind == "full with a mean" else kind.removeprefix("full ")
        teacher = FullTeacherRows(teacher_nS, teacher_3n, None, divergence, 0.3)  # type: ignore[arg-type]
        given = replace(given, kd_grad=ones_n1, teacher=teacher)
    if kind == "full with a mean":
        given = replace(given, mean=torch.linspace(-1.0, 1.0, n, device=device))
    over_nS = z_nS.clone()
    in_place = replace(given, logits=over_nS, gradient=over_nS.view(dtype)[:, :S])
    for rows in (given, in_place):
        if rows.teacher is not None and rows.mean is None:
            kernels.divergence(rows)
        else:
            kernels.gradient(rows)
    assert given.gradient is not None
    assert in_place.gradient is not None
    return given.gradient[:, :V].cpu(), in_place.gradient[:, :V].cpu()
