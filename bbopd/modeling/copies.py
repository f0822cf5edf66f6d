"""A second model beside the one that is trained, for no more memory than what differs between the two."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def copy_of_trained(model: PreTrainedModel, shared: Mapping[int, Any] | None = None) -> PreTrainedModel:
    """A copy that has its own trained weights, and frozen ones in common with ``model``: of a student with adapters these alone are new.

    ``shared`` are further objects, by `id`, that are not to be copied.
    """
    frozen = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, {**frozen, **(shared or {})})


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights that are trained, by name, tied ones once, without gradients; the tensors are the model's own."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def trained_bytes(model: nn.Module) -> int:
    """Of `trained_weights`."""
    return sum(tensor.nbytes for tensor in trained_weights(model).values())


class FrozenCopy:
    """``model`` as it is now, by `copy_of_trained`, never to be trained; what differs from the original can be saved and brought back."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = copy_of_trained(model).eval()
        self._trained = tuple(trained_weights(self.model))
        self.model.requires_grad_(False)
        self.model.gradient_checkpointing_disable()

    def tensors(self) -> dict[str, Tensor]:
        """Those of its weights that the original trains, by name, tied ones once; the tensors are its own."""
        return {name: self.model.get_parameter(name) for name in self._trained}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the weights that `tensors` gave. Raises `ValueError` for those of another model; nothing has changed then."""
        own = self.tensors()
        if {name: one.shape for name, one in tensors.items()} != {name: one.shape for name, one in own.items()}:
            raise ValueError(f"they are of another model than {type(self.model).__name__} as it is trained here")
        for name, tensor in own.items():
            tensor.copy_(tensors[name])
