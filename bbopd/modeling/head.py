"""The output head in the open: what turns hidden states into logits, as numbers that the fused ops can take.

Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import nn

from bbopd.errors import ModelError
from bbopd.modeling.layers import decoder
from bbopd.output_head import OutputHead

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CHECKED_TOKENS = 8


def output_head(model: PreTrainedModel, vocab_size: int | None = None) -> OutputHead:
    """Read a model's head and prove it on a few tokens against the model's own logits.

    Costs two forward passes of 8 tokens; call it once, the parameters in it stay the model's. ``vocab_size`` goes into it as it is.

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
    head = OutputHead(linear.weight, linear.bias, scale, float(softcap) if softcap else None, vocab_size)
    if not linear.weight.is_meta:  # of shapes alone there is nothing to prove
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
