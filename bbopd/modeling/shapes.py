"""How large a model is, and what a pass through it keeps for the backward one, without one of its weights being read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from bbopd.modeling.layers import decoder, decoder_layers
from bbopd.modeling.load import max_positions
from bbopd.modeling.lora import adapter_parameters, is_adapted
from bbopd.modeling.packed import packed_attention, packed_hidden
from bbopd.modeling.quantized import Quantization, quantized_bytes
from bbopd.vllm_setup import kv_bytes_of_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Activations", "ModelShape", "measure_activations", "shape_of"]

_FLOAT32 = 4
_SEQUENCES = (1, 2)  # of the two passes whose difference is what tokens take
_LAYERS = 4  # of a model that is run through: in some, every second one is of another kind


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers of entries, a tied weight counted once; bytes where the name says so."""

    name: str
    parameters: int
    """Without adapters."""
    trained: int
    """All of them, or the adapters'."""
    frozen_bytes: int
    """Of what is not trained, as it is held."""
    largest_layer: int
    """Entries of the largest decoder layer."""
    outside_layers: int
    """Embeddings, final norm, head."""
    layers: int
    hidden: int
    vocabulary: int
    head_is_trained: bool
    kv_entries: int
    """Keys and values of one token in all layers."""
    positions: int | None

    @property
    def trained_bytes(self) -> int:
        return _FLOAT32 * self.trained


def shape_of(model: PreTrainedModel, name: str, quantize: Quantization | None = None) -> ModelShape:
    """Shape of a model, on the meta device say, and of what its frozen matrices take as codes."""
    body = decoder(model)
    config = model.config.get_text_config(decoder=True)
    has_adapters = is_adapted(model)
    adapters = sum(one.numel() for one in adapter_parameters(model).values()) if has_adapters else 0
    parameters = sum(one.numel() for one in model.parameters()) - adapters
    linear = [module.weight for module in body.modules() if isinstance(module, nn.Linear)]
    matrices = [weight for weight in linear if not (has_adapters and weight.requires_grad)]
    of_matrices = sum(weight.numel() for weight in matrices)
    frozen = 0
    if has_adapters and quantize is not None:
        frozen = _FLOAT32 * (parameters - of_matrices) + sum(quantized_bytes(weight.shape, quantize) for weight in matrices)
    elif has_adapters:
        frozen = _FLOAT32 * parameters
    of_layers = [sum(one.numel() for one in layer.parameters()) for layer in decoder_layers(body)]
    head = model.get_output_embeddings()
    return ModelShape(
        name=name,
        parameters=parameters,
        trained=adapters or parameters,
        frozen_bytes=frozen,
        largest_layer=max(of_layers),
        outside_layers=sum(one.numel() for one in model.parameters()) - sum(of_layers),
        layers=len(of_layers),
        hidden=int(config.hidden_size),
        vocabulary=int(model.get_input_embeddings().weight.shape[0]),
        head_is_trained=bool(head is not None and head.weight.requires_grad),
        kv_entries=kv_bytes_of_token(config, 1),
        positions=max_positions(model),
    )


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes that a training pass of the body keeps until its backward one. ``of_token`` is of one packed token in all layers, of which
    ``of_layer`` is one layer's; ``cast_weights`` are copies of weights in the compute dtype, whatever the number of tokens."""

    of_token: float
    of_layer: float
    cast_weights: int


def measure_activations(
    build: Callable[[int], PreTrainedModel], layers: int, dtype: torch.dtype, *, sequence_tokens: int, checkpointing: bool
) -> Activations | None:
    """What `packed_hidden` keeps of a model of so many ``layers``, counted on tensors that have shapes and no memory.

    ``build`` gives it with the first few of its layers alone: the others are taken to be like these. It is of sequences of
    ``sequence_tokens``: attention that keeps its weights takes more the longer they are. None where passes cannot be followed by shapes
    alone (experts whose tokens are counted, recurrent layers).
    """
    few = min(layers, _LAYERS)
    fewer = max(1, few // 2)
    try:
        whole, of_layer = _of_layers(build, layers, few, fewer, dtype, sequence_tokens, checkpointing=False)
        kept = whole
        if checkpointing:
            kept, _ = _of_layers(build, layers, few, fewer, dtype, sequence_tokens, checkpointing=True)
    except (RuntimeError, NotImplementedError):
        return None
    return Activations(kept.of_token, of_layer.of_token, of_layer.fixed if checkpointing else whole.fixed)


@dataclass(frozen=True, slots=True)
class _Kept:
    """Bytes for each token, and those that stay whatever their number."""

    of_token: float
    fixed: int


def _of_layers(
    build: Callable[[int], PreTrainedModel],
    layers: int,
    few: int,
    fewer: int,
    dtype: torch.dtype,
    sequence_tokens: int,
    *,
    checkpointing: bool,
) -> tuple[_Kept, _Kept]:
    """Of all ``layers``, and of one, by those that ``few`` of them and ``fewer`` keep."""
    more, less = (_kept_by(build, count, dtype, sequence_tokens, checkpointing=checkpointing) for count in (few, fewer))
    if few == fewer:
        return more, more
    steps = few - fewer
    one = _Kept((more.of_token - less.of_token) / steps, (more.fixed - less.fixed) // steps)
    return _Kept(more.of_token + one.of_token * (layers - few), more.fixed + one.fixed * (layers - few)), one


def _kept_by(
    build: Callable[[int], PreTrainedModel], layers: int, dtype: torch.dtype, sequence_tokens: int, *, checkpointing: bool
) -> _Kept:
    boundaries = [torch.arange(count + 1) * sequence_tokens for count in _SEQUENCES]  # with values: the packing goes by them
    with torch.device("meta"):
        model = build(layers).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with FakeTensorMode():
        _to_fake(model)
        kept = [_kept(model, bounds, dtype) for bounds in boundaries]
    of_token = (kept[1] - kept[0]) / ((_SEQUENCES[1] - _SEQUENCES[0]) * sequence_tokens)
    return _Kept(of_token, round(kept[0] - of_token * _SEQUENCES[0] * sequence_tokens))


def _to_fake(model: nn.Module) -> None:
    """Parameters and buffers from the meta device, on which attention keeps other tensors, to ones that look like the CPU's."""
    known: dict[int, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in known:
                    fake: Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    known[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
                tensors[name] = known[id(tensor)]  # type: ignore[assignment]


def _kept(model: PreTrainedModel, boundaries: Tensor, dtype: torch.dtype) -> int:
    """Bytes that a pass of packed sequences keeps, other than parameters; storage that several tensors share counts once."""
    own = {_storage(parameter) for parameter in model.parameters()} | {_storage(buffer) for buffer in model.buffers()}
    kept: dict[int, int] = {}
    alive: list[Any] = []  # a storage that is let go might lend its address to another

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor.untyped_storage().nbytes()
            alive.append(tensor)
        return tensor

    sequences, tokens = len(boundaries) - 1, int(boundaries.tolist()[-1])
    ids = torch.zeros(tokens, dtype=torch.int64)
    positions = torch.arange(tokens // sequences).repeat(sequences)
    rounds = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)
    with packed_attention(model), rounds, saved_tensors_hooks(keep, lambda tensor: tensor):
        alive.append(packed_hidden(model, ids, positions, boundaries))
    return sum(kept.values())


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
