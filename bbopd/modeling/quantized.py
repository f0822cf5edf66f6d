"""Frozen linear layers in four or eight bits: by bitsandbytes what is stored, in the trainer's own precision what is computed.

A layer's matrix is made from its codes when it is multiplied by, and let go: also in the backward pass, which makes it again. So training,
sampling and the matrices that are pushed to an engine mean the same weights to the last bit. That is why bitsandbytes' own layers do not
stand here: in eval mode on a CPU their four bits are laid out otherwise and multiplied in bfloat16, and their eight bits round what goes in
as well, so a student would write as one model and be trained as another.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bbopd.errors import ModelError
from bbopd.extras import need
from bbopd.modeling.layers import decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["nf4", "int8"]

_BLOCK = 64  # weights that share a scale
_SCALE_BLOCK = 256  # scales that share a scale of their own
_LARGEST_INT8 = 127.0


def quantized_bytes(shape: Sequence[int], kind: Quantization) -> int:
    """What the codes of a matrix of ``shape`` take, with all that turns them into it."""
    rows, size = shape[0], math.prod(shape)
    if kind == "int8":
        return size + 4 * rows
    blocks = math.ceil(size / _BLOCK)
    return math.ceil(size / 2) + blocks + 4 * math.ceil(blocks / _SCALE_BLOCK) + 4


class QuantizedLinear(nn.Linear):
    """A frozen ``nn.Linear`` whose ``weight`` holds codes, and whose other parameters, all frozen, turn them into its matrix."""

    scales: Tensor

    def __init__(self, layer: nn.Linear, **held: Tensor) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(held.pop("weight"), requires_grad=False)
        self.register_parameter("bias", layer.bias)
        for name, tensor in held.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[out, in], as it is multiplied by."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self)
        return product


class NF4Linear(QuantizedLinear):
    """Four bits a weight, NormalFloat by blocks of 64, scales in eight bits (QLoRA, Dettmers et al. 2023, section 3): 4.13 in all."""

    scales_of_scales: Tensor
    mean_scale: Tensor

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        weight = layer.weight.detach().to(device)
        codes, state = _bitsandbytes().quantize_4bit(weight, blocksize=_BLOCK, compress_statistics=True, quant_type="nf4")
        super().__init__(layer, weight=codes, scales=state.absmax, scales_of_scales=state.state2.absmax, mean_scale=state.offset.reshape(1))

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        functional = _bitsandbytes()
        device, size = self.weight.device, self.out_features * self.in_features
        scales = functional.QuantState(absmax=self.scales_of_scales, code=_scale_codes(device), blocksize=_SCALE_BLOCK, dtype=torch.float32)
        state = functional.QuantState(
            absmax=self.scales,
            shape=torch.Size((1, size + size % 2)),  # rows of odd length would have a CPU compile a kernel of its own
            code=_weight_codes(device),
            blocksize=_BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.mean_scale[0],
            state2=scales,
        )
        flat: Tensor = functional.dequantize_4bit(self.weight, state)
        return flat[0, :size].view(self.out_features, self.in_features)


class Int8Linear(QuantizedLinear):
    """Eight bits a weight, one scale for each row: its largest magnitude (LLM.int8, Dettmers et al. 2022, section 2.1)."""

    def __init__(self, layer: nn.Linear, device: torch.device) -> None:
        codes, scales, _ = _bitsandbytes().int8_vectorwise_quant(layer.weight.detach().to(device, torch.float16))
        super().__init__(layer, weight=codes, scales=scales)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return (self.weight.float() * (self.scales[:, None] / _LARGEST_INT8)).to(dtype)


_KINDS: dict[Quantization, type[NF4Linear] | type[Int8Linear]] = {"nf4": NF4Linear, "int8": Int8Linear}


class _Product(torch.autograd.Function):
    """``x @ matrix.T + bias``; x [..., in] in the dtype that is multiplied in, and the only one with a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, layer.matrix(x.dtype), None if layer.bias is None else layer.bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.matrix(gradient.dtype), None


def quantize_body(model: PreTrainedModel, kind: Quantization, device: torch.device) -> None:
    """Put `QuantizedLinear` in place of every linear layer of the body, one at a time, on ``device``; embeddings, norms and the head stay.

    Raises
    ------
    ConfigError
        bitsandbytes is not installed.
    ModelError
        The body has no plain linear layers.
    """
    _bitsandbytes()
    body = decoder(model)
    names = [name for name, module in body.named_modules() if type(module) is nn.Linear]
    if not names:
        raise ModelError(f"student.quantize: the body of {type(model).__name__} has no plain linear layers: leave it out")
    for name in names:
        parent, _, own = name.rpartition(".")
        body.get_submodule(parent).register_module(own, _KINDS[kind](body.get_submodule(name), device))


def plain_matrix(layer: Any) -> Tensor:
    """The matrix of a linear layer, quantised (float32 then) or not; detached."""
    matrix: Tensor = layer.matrix() if isinstance(layer, QuantizedLinear) else layer.weight.detach()
    return matrix


def plain_linear(layer: QuantizedLinear, matrix: Tensor) -> nn.Linear:
    """What ``layer`` was before it was quantised, with ``matrix`` as its weight, on the CPU: there may be no room for it elsewhere."""
    plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(matrix.cpu())
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().cpu())
    return plain


def plain_sizes(model: nn.Module) -> list[int]:
    """How many numbers each parameter has, tied ones once; of a quantised layer's those of its matrix."""
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    codes = {id(one) for layer in layers for name, one in layer.named_parameters(recurse=False) if name != "bias"}
    matrices = [layer.in_features * layer.out_features for layer in layers]
    return [parameter.numel() for parameter in model.parameters() if id(parameter) not in codes] + matrices


@contextmanager
def muted() -> Iterator[None]:
    """Around an import of bitsandbytes, which on a CPU tells of a kernel for inference that it lacks and that is not used here."""
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@lru_cache(maxsize=1)
def _bitsandbytes() -> Any:
    with muted():
        return need("bitsandbytes.functional", "student.quantize", extra="quantize")


@lru_cache
def _weight_codes(device: torch.device) -> Tensor:
    return _bitsandbytes().get_4bit_type("nf4", device=device)


@lru_cache
def _scale_codes(device: torch.device) -> Tensor:
    return _bitsandbytes().create_dynamic_map().to(device)
