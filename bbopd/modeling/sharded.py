"""A model split over ranks by FSDP2 (Zhao et al. 2304.11277, in its per-parameter form): each holds a slice of every weight.

A layer's weights are gathered just before it runs, and freed after it; what belongs to no layer (embedding, final norm, output head) forms
one group, gathered at the beginning of a pass and kept until its end, so that the head is whole while the fused loss multiplies by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch
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
from bbopd.modeling.packed import packed_attention, packed_hidden

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PASS = "packed_pass"  # the method of a model that is sharded, by which its body is run


def shard_model(model: PreTrainedModel, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
    """Split ``model``, which all ranks of ``mesh`` hold alike, in place; two dimensions replicate over the first.

    Parameters become DTensors, on the mesh's device or, with ``parallel.cpu_offload``, in the host's memory. Gradients are *summed* over
    the ranks, in float32: the loss has the whole step's count of tokens in it already.

    Raises `ModelError` for a model whose layers, or whose head, cannot be split so.
    """
    with packed_attention(model):  # settles whether the model can be packed, which takes passes of the whole
        pass
    gathered = torch.bfloat16 if parallel.gather == "bfloat16" else None
    has_gpu = mesh.device_type == "cuda"
    options: dict[str, Any] = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=gathered, reduce_dtype=torch.float32, cast_forward_inputs=False),
        "offload_policy": CPUOffloadPolicy(pin_memory=has_gpu) if parallel.cpu_offload else OffloadPolicy(),
    }
    for layer in decoder_layers(decoder(model)):
        fully_shard(layer, **options)
    setattr(model, _PASS, MethodType(_packed_pass, model))
    own = _split_head(model, mesh) if parallel.head == "split" else set()
    fully_shard(model, reshard_after_forward=False, ignored_params=own, **options)
    register_fsdp_forward_method(model, _PASS)
    for module in _sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # the only reduction that gloo has


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
        head.register_parameter(name, nn.Parameter(split, requires_grad=parameter.requires_grad))
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
    """Names and whole float32 tensors of a sharded model's parameters, a tied one once, one gathered after the other. All ranks iterate."""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor), "between two passes parameters are slices"
        yield name, cast("DTensor", parameter.detach()).full_tensor()


def _packed_pass(model: PreTrainedModel, input_ids_P: Tensor, position_ids_P: Tensor, boundaries_S1: Tensor) -> Tensor:
    return packed_hidden(model, input_ids_P, position_ids_P, boundaries_S1).clone()  # FSDP's hooks want no view


def _sharded_modules(model: PreTrainedModel) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))
