"""A model's output head as numbers: what the two ops take beside hidden states, in one piece.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """``logits = softcap(logit_scale * (hidden @ weight_VD.T + bias))``; weight and bias may be a model's own parameters.

    Logits from ``vocab_size`` on only pad the head, and have no probability; None: all are of tokens. With a ``group``, weight and bias are
    its rank's own rows, as `linear_distill` takes them; `linear_logprobs` takes no such head.
    """

    weight_VD: Tensor  # noqa: N815
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    vocab_size: int | None = None
    group: ProcessGroup | None = None

    @property
    def options(self) -> dict[str, Any]:
        """All but the weight, as both ops name it: ``linear_distill(hidden, head.weight_VD, ..., **head.options)``."""
        return {
            "bias": self.bias,
            "logit_scale": self.logit_scale,
            "logit_softcap": self.logit_softcap,
            "vocab_size": self.vocab_size,
            **({} if self.group is None else {"group": self.group}),
        }

    def to(self, dtype: torch.dtype) -> OutputHead:
        """The same with the weight in ``dtype``, as autocast would have it; gradients reach this one's."""
        return replace(self, weight_VD=self.weight_VD.to(dtype))

    def without_padding(self) -> OutputHead:
        """The rows of tokens alone, as views, so that padded logits are never computed. Not for training."""
        bias = None if self.bias is None else self.bias.detach()[: self.vocab_size]
        return replace(self, weight_VD=self.weight_VD.detach()[: self.vocab_size], bias=bias, vocab_size=None)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32, for the few tokens of a check or of a sampling step; losses go through the fused ops."""
        z_NV = F.linear(hidden_ND, self.weight_VD, self.bias).float() * self.logit_scale
        return self.logit_softcap * torch.tanh(z_NV / self.logit_softcap) if self.logit_softcap else z_NV
