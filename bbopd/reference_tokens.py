"""Which tokens of a call count and by how much, and whether what was given of them makes sense.

Shape suffixes: ``N`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bbopd import op_checks


@dataclass(frozen=True, slots=True, eq=False)
class TokenWeights:
    """Which tokens count, and by how much: dloss/dCE and dloss/dKD of each, in the compute dtype."""

    ce: Tensor  # [N]
    kd: Tensor  # [N]
    has_label: Tensor  # [N] bool
    signal: Tensor  # [N] bool
    counts: Tensor  # [2] tokens with a label, tokens with a signal
    t2: float

    @classmethod
    def of(
        cls,
        hidden: Tensor,
        labels: Tensor | None,
        token_weight: Tensor | None,
        normalizer: Tensor | None,
        valid: Tensor | None,
        weights: Tensor,
        kind: str,
        temperature: float,
        t2_scaling: bool,
        ignore_index: int,
        dtype: torch.dtype,
    ) -> TokenWeights:
        N, device = hidden.shape[0], hidden.device
        has_label_N = torch.zeros(N, dtype=torch.bool, device=device) if labels is None else labels != ignore_index
        signal_N = valid if valid is not None else torch.full((N,), kind != "none", device=device)
        counts_2 = torch.stack([has_label_N.sum(), signal_N.sum()]).to(dtype)
        norm_2 = counts_2 if normalizer is None else normalizer.to(dtype)
        norm_2 = torch.where(norm_2 > 0, norm_2, 1.0)
        weight_N = torch.ones(N, dtype=dtype, device=device) if token_weight is None else token_weight.to(dtype)
        weights = weights.to(dtype)
        t2 = temperature**2 if t2_scaling else 1.0
        ce_N = torch.where(has_label_N, weight_N * (weights[0] / norm_2[0]), 0.0)
        kd_N = torch.where(signal_N, weight_N * (weights[1] * t2 / norm_2[1]), 0.0)
        return cls(ce_N, kd_N, has_label_N, signal_N, counts_2, t2)

    def metrics(self, kind: str, floored_N: Tensor, extra_N: Tensor | None, ratio_N: Tensor, ratio_cap: float) -> Tensor:
        """The metrics in the order of `METRICS`."""
        dtype, signals = self.counts.dtype, self.counts[1].clamp(min=1.0)
        tail = torch.zeros_like(signals)
        if kind == "topk" and extra_N is not None:
            tail = torch.where(self.signal, extra_N.exp(), 0.0).sum() / signals
        ratio = torch.where(self.signal, ratio_N, 0.0).sum() / signals
        capped = (ratio_N > ratio_cap).sum().to(dtype)
        return torch.stack([self.counts[0], self.counts[1], floored_N.sum().to(dtype), tail, ratio, capped])


def check_values(
    labels: Tensor | None,
    token_weight: Tensor | None,
    normalizer: Tensor | None,
    valid: Tensor | None,
    ids: Tensor | None,
    logprobs: Tensor | None,
    extra: Tensor | None,
    kind: str,
    vocab_size: int,
    ignore_index: int,
) -> None:
    if labels is not None:
        op_checks.check_id_values("labels", labels, vocab_size, empty=ignore_index)
    if token_weight is not None:
        op_checks.check_finite("token_weight", token_weight)
    if normalizer is not None:
        op_checks.check_normalizer(normalizer)
    if ids is None or logprobs is None or extra is None:
        return
    if kind == "topk":
        op_checks.check_id_values(
            "teacher.ids", ids if valid is None else ids.masked_fill(~valid[:, None], -1), vocab_size, empty=-1, unique=True
        )
        op_checks.check_distribution(ids, logprobs, extra, valid)
    else:
        used = slice(None) if valid is None else valid
        op_checks.check_id_values("teacher.token_ids", ids[used], vocab_size)
        op_checks.check_finite("teacher.behavior_logprobs", extra[used])
        op_checks.check_finite("teacher.logprobs or advantages", logprobs[used])
