"""A model split over ranks by FSDP2 (Zhao et al. 2304.11277, in its per-parameter form): each holds a slice of every weight.

A layer's weights are gathered just before it runs, and freed after it; what belongs to no layer (embedding, final norm, output head) forms
one group, gathered at the beginning of a pass and kept until its end, so that the head is whole while the fused loss multiplies by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from bbopd.config import ParallelConfig
from bbopd.errors import ModelError
from bbopd.modeling.layers import decoder, decoder_layers
from bbopd.modeling.packed import can_pack, packed_hidden, settle_packing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASS = "packed_pass"  # the method of a model that is sharded, by which its body is run


def shard_model(model: PreTrainedModel, whole: PreTrainedModel | None, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Split ``model``, which is empty (on the meta device) on all ranks of ``mesh``, in place; two dimensions replicate over the first.

    Its values are those of ``whole``, which rank 0 alone holds and which is not changed. They travel layer by layer, so that no other rank
    holds more than its slices and one group of weights. Parameters become DTensors, on the mesh's device or, with ``parallel.cpu_offload``,
    in the host's memory. Gradients are *summed* over the ranks, in float32: the loss has the whole step's count of tokens in it already.

    Raises `ModelError` for a model whose layers, or whose head, cannot be split so, or that is not built as ``whole`` is.
    """
    source = None if whole is None else _Values(model, whole)
    packs = torch.tensor([whole is not None and can_pack(whole)])  # which takes passes of the whole
    dist.broadcast(packs, 0)
    settle_packing(model, bool(packs))
    gathered = torch.bfloat16 if parallel.gather == "bfloat16" else None
    has_gpu = mesh.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=has_gpu) if parallel.cpu_offload else OffloadPolicy(),
    }
    _fill_buffers(model, source)
    for layer in decoder_layers(decoder(model)):
        _fill(model, layer, source)
        fully_shard(layer, **options)
    _fill(model, model, source)
    setattr(model, _PASS, MethodType(_packed_pass, model))
    own = _split_head(model, mesh) if parallel.head == "split" else set()
    fully_shard(model, reshard_after_forward=False, ignored_params=own, **options)
    register_fsdp_forward_method(model, _PASS)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has


class _Values:
    """Those of rank 0's whole student, by the names in ``empty``."""

    def __init__(self, empty: PreTrainedModel, whole: PreTrainedModel) -> None:
        self._tensors = dict(whole.named_parameters()) | _buffers(whole)
        wanted = dict(empty.named_parameters()) | _buffers(empty)
        odd = [name for name, tensor in wanted.items() if not _is_alike(tensor, self._tensors.get(name))]
        if odd or wanted.keys() != self._tensors.keys():
            name = min(odd or wanted.keys() ^ self._tensors.keys())
            raise ModelError(
                f"{type(whole).__name__} has other tensors than its configuration says, such as {name}: it cannot be split over ranks"
            )

    def of(self, name: str) -> Tensor:
        """A copy, in the host's memory."""
        return self._tensors[name].detach().to("cpu", copy=True)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def _is_alike(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and (tensor.shape, tensor.dtype) == (other.shape, other.dtype)


def _sent(name: str, empty: Tensor, source: _Values | None) -> Tensor:
    value = torch.empty(empty.shape, dtype=empty.dtype, device="cpu") if source is None else source.of(name).contiguous()
    dist.broadcast(value, 0)
    return value


def _fill_buffers(model: nn.Module, source: _Values | None) -> None:
    for name, buffer in _buffers(model).items():
        module, _, key = name.rpartition(".")
        model.get_submodule(module)._buffers[key] = _sent(name, buffer, source)


def _fill(model: nn.Module, part: nn.Module, source: _Values | None) -> None:
    """Give the parameters of ``part`` that are still empty their values; one that is tied stays so."""
    of_part = {id(parameter) for parameter in part.parameters() if parameter.is_meta}
    for name, empty in list(model.named_parameters()):
        if id(empty) in of_part:
            filled = nn.Parameter(_sent(name, empty, source), requires_grad=empty.requires_grad)
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    if parameter is empty:
                        module._parameters[key] = filled


def _split_head(model: PreTrainedModel, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Give each rank its rows of the output head for good; the new parameters, which FSDP is to leave alone."""
    head = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        raise ModelError(
            f"{type(model).__name__} has one matrix for embedding and output head, which looks ids up and so is gathered anyway: "
            "leave train.parallel.head as gathered"
        )
    for name, parameter in list(head.named_parameters()):
        split = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
        head.register_parameter(name, nn.Parameter(split.clone(), requires_grad=parameter.requires_grad))  # the whole is let go
    return set(head.parameters())


def sharded_hidden(model: PreTrainedModel, input_ids_P: Tensor, position_ids_P: Tensor, boundaries_S1: Tensor) -> Tensor:
    """`packed_hidden` of a sharded model, within `packed_attention`; all ranks call it as often, each with tokens of its own.

    Until the backward pass has ended, the parameters of embedding and output head are whole tensors.
    """
    hidden_PD: Tensor = getattr(model, _PASS)(input_ids_P, position_ids_P, boundaries_S1)
    return hidden_PD


def forget_pass(model: PreTrainedModel) -> None:
    """Back to slices after a pass that was broken off."""
    cast("FSDPModule", model).reset_iter_state()


def gathered_weights(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and whole float32 tensors of what a sharded model trains, a tied one once, one gathered after the other. All ranks iterate."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert isinstance(parameter, DTensor), "between two passes parameters are slices"
        yield name, cast("DTensor", parameter.detach()).full_tensor()


def _packed_pass(model: PreTrainedModel, input_ids_P: Tensor, position_ids_P: Tensor, boundaries_S1: Tensor) -> Tensor:
    return packed_hidden(model, input_ids_P, position_ids_P, boundaries_S1).clone()  # FSDP's hooks want no view


def _sharded_modules(model: PreTrainedModel) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
