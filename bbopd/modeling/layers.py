"""Drop decoder layers from a model in place, so that it saves, loads, and generates as if it had been made that way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bbopd.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PER_LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "block_types", "attention_layers")


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The body of a causal language model: token ids in, hidden states after the final norm out."""
    body = model.get_decoder()
    if body is model:  # Llama 4 names its body by another prefix than it declares
        body = getattr(model, "model", model)
    if body is model:
        raise ModelError(f"{type(model).__name__} has no separate body and head, which distillation needs: use a decoder-only causal model")
    return body


def keep_layers(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Keep only ``layers`` (indices from 0, rising) of the decoder, and make the config say so.

    Raises
    ------
    ModelError
        An index the model does not have, or an architecture whose layers depend on their number in a way unknown here.
    """
    body = decoder(model)
    config = body.config
    total = int(config.num_hidden_layers)
    chosen = list(layers)
    if not chosen or chosen != sorted(set(chosen)) or chosen[0] < 0 or chosen[-1] >= total:
        raise ModelError(
            f"keep_layers {chosen} does not fit a model of {total} layers: give rising indices from 0 to {total - 1}, each once"
        )
    name, stack = _layer_stack(body, total)
    kept = [stack[index] for index in chosen]
    for position, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = position  # type: ignore[assignment]  # the slot of its keys and values in the cache
    setattr(body, name, nn.ModuleList(kept))
    config.num_hidden_layers = len(kept)
    for key in _PER_LAYER_LISTS:
        values = getattr(config, key, None)
        if isinstance(values, (list, tuple)) and len(values) == total:
            setattr(config, key, [values[index] for index in chosen])
    _check_rebuilds(model)


def decoder_layers(body: PreTrainedModel) -> nn.ModuleList:
    """The layers that a body runs one after another. Raises `ModelError` where they are in no list."""
    return _layer_stack(body, int(body.config.num_hidden_layers))[1]


def _layer_stack(body: PreTrainedModel, total: int) -> tuple[str, nn.ModuleList]:
    for name, child in body.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == total:
            return name, child
    raise ModelError(
        f"{type(body).__name__} keeps its {total} layers in no list: they can be neither dropped (init.keep_layers) nor split over ranks"
    )


def _check_rebuilds(model: PreTrainedModel) -> None:
    """A model built from the new config must have the same tensors, or it would not load again."""

    def shapes(of: PreTrainedModel) -> dict[str, Any]:
        return {key: tuple(value.shape) for key, value in of.state_dict().items()}

    with torch.device("meta"):
        rebuilt = shapes(type(model)(model.config))
    if shapes(model) != rebuilt:
        differing = sorted(set(shapes(model).items()) ^ set(rebuilt.items()))
        raise ModelError(
            f"{type(model).__name__} gives its layers shapes that depend on their number (such as {differing[0][0]}), so dropping some "
            "would leave a model that cannot be loaded again: leave init.keep_layers out"
        )
