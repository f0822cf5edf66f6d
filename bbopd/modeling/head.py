"""The output head in the open: what turns hidden states into logits, as numbers that the fused ops can take.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bbopd.errors import ModelError
from bbopd.modeling.layers import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED_TOKENS = 8


@dataclass(frozen=True, slots=True, eq=False)
class OutputHead:
    """``logits = softcap(logit_scale * (hidden @ weight_VD.T + bias))``; weight and bias are the model's own parameters."""

    weight_VD: Tensor  # noqa: N815
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def without_padding(self, vocab_size: int | None) -> OutputHead:
        """The first ``vocab_size`` rows alone (None: all), as views, so that padded logits are never computed. Not for training."""
        bias = self.bias if self.bias is None else self.bias.detach()[:vocab_size]
        return replace(self, weight_VD=self.weight_VD.detach()[:vocab_size], bias=bias)

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """Logits [N, V] in fp32, for the few tokens of a check or of a sampling step; losses go through the fused ops."""
        z_NV = nn.functional.linear(hidden_ND, self.weight_VD, self.bias).float() * self.logit_scale
        return self.logit_softcap * torch.tanh(z_NV / self.logit_softcap) if self.logit_softcap else z_NV


def output_head(model: PreTrainedModel) -> OutputHead:
    """Read a model's head and prove it on a few tokens against the model's own logits.

    Costs two forward passes of 8 tokens; call it once, the parameters in it stay the model's.

    Raises
    ------
    ModelError
        The architecture computes its logits in a way that `OutputHead` cannot express.
    """
    linear = model.get_output_embeddings()
    if not isinstance(linear, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no linear output head, which distillation needs: use a decoder-only causal model")
    config = model.config.get_text_config(decoder=True)
    scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)  # Falcon-H1
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and later
    head = OutputHead(linear.weight, linear.bias, scale, float(softcap) if softcap else None)
    _check(model, head)
    return head


@torch.no_grad()
def _check(model: PreTrainedModel, head: OutputHead) -> None:
    vocabulary = head.weight_VD.shape[0]
    ids = torch.linspace(0, vocabulary - 1, _CHECKED_TOKENS, device=head.weight_VD.device).long()[None]
    with undisturbed(model) as tolerance:
        hidden_ND = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
        expected_NV = model(input_ids=ids, use_cache=False).logits[0].float()
    difference = (head.logits(hidden_ND) - expected_NV).abs().max()
    if not difference <= tolerance * expected_NV.abs().max().clamp(min=1e-6):
        raise ModelError(
            f"{type(model).__name__} does not compute its logits as softcap(scale * (hidden @ weight.T + bias)): they differ by "
            f"{float(difference):.3g}; losses would be wrong, so this architecture is refused (bbopd/modeling/head.py lists those known)"
        )


@contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[float]:
    """Run a check in eval mode, at the precision of the weights, and leave every module's mode as it was.

    Gives the relative difference that rounding may make. flash-attn takes no float32, so a model with it is checked in bfloat16.
    """
    modes = [(module, module.training) for module in model.modules()]
    is_exact = model.dtype == torch.float32
    must_round = is_exact and "flash" in model.config._attn_implementation
    model.eval()
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=must_round):
            yield 1e-3 if is_exact and not must_round else 3e-2
    finally:
        for module, mode in modes:
            module.training = mode
