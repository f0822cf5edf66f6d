"""The engine's end of a weight push, as one of vLLM's own weight-transfer engines: it reads the window that the trainer fills.

Imported in the engine's process alone. vLLM's layer-wise reload gives every layer its weights in the form that its kernels want (packed,
on a CPU), in the memory where it had them before, so graphs that were captured over it stay valid.
"""

from __future__ import annotations

import base64
import mmap
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import layerwise
from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload, initialize_layerwise_reload

from bbopd.rollouts.vllm_weights import view_tensors

BACKEND = "bbopd_window"
_LEFT_OUT = "%s: Failed to load weights"  # as vLLM warns; a push that left out too much is refused before it comes to that


@dataclass
class WindowInitInfo(WeightTransferInitInfo):
    """`WeightWindow.describe`: how this process sees the trainer's memory."""

    capacity: int
    dtype: str
    file: int | None = None
    cuda: list[Any] | None = None


@dataclass
class WindowUpdateInfo(WeightTransferUpdateInfo):
    """What lies in the window now: an item of `WeightWindow.fill`."""

    tensors: list[dict[str, Any]]


class WindowTransferEngine(WeightTransferEngine[WindowInitInfo, WindowUpdateInfo]):
    """Loads parameters from a window of memory that the trainer fills, a window at a time."""

    init_info_cls = WindowInitInfo
    update_info_cls = WindowUpdateInfo

    def init_transfer_engine(self, init_info: WindowInitInfo) -> None:
        self._dtype = getattr(torch, init_info.dtype)
        if init_info.file is not None:
            self._memory = torch.frombuffer(mmap.mmap(init_info.file, init_info.capacity), dtype=torch.uint8)
            os.close(init_info.file)
        else:
            assert init_info.cuda is not None
            self._memory = _rebuild_cuda(init_info.cuda, self.device)
        self._missing: set[str] = set()
        self.is_filled = False  # where it is, a push may leave out layers that have not changed: a reload puts back what they had

    def start_weight_update(self) -> None:
        self._missing = set() if self.is_filled else {name for name, _ in self.model.named_parameters()}
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: WindowUpdateInfo) -> None:
        # a reload keeps what it is given until the layer is complete, which may be after the window has been filled again: hence clones,
        # made one at a time and gone as soon as their layer is
        weights = ((name, tensor.clone()) for name, tensor in view_tensors(self._memory, update_info.tensors, self._dtype))
        loaded = self.model.load_weights(weights)
        self._missing -= loaded or set()

    def finish_weight_update(self) -> None:
        if self._missing:
            raise ValueError(f"the push left out {len(self._missing)} parameters of the engine's model, such as {min(self._missing)}")
        finalize_layerwise_reload(self.model, self.model_config)
        _repack_tied(self.model)
        self.is_filled = True

    def shutdown(self) -> None:
        pass

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        raise NotImplementedError("the trainer's end is bbopd.rollouts.vllm.VLLMEngine.load_weights")


def register() -> None:
    """Make the transfer known to vLLM in this process, whose reload is to say nothing of layers that a push leaves out on purpose."""
    WeightTransferEngineFactory.register_engine(BACKEND, WindowTransferEngine)
    layerwise.logger.addFilter(lambda record: record.msg != _LEFT_OUT)


def _repack_tied(model: torch.nn.Module) -> None:
    """A head tied to the embedding keeps its own packed copy on a CPU, and a reload, which loads the embedding, leaves that as it was."""
    seen: set[int] = set()
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and id(weight) in seen and isinstance(module.quant_method, QuantizeMethodBase):
            module.quant_method.process_weights_after_loading(module)
        seen.add(id(weight))


def _rebuild_cuda(arguments: list[Any], device: torch.device) -> Tensor:
    """The trainer's block of GPU memory, from what `WeightWindow.describe` wrote of it."""
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    decoded = [base64.b64decode(value["bytes"]) if isinstance(value, dict) else value for value in arguments]
    decoded[0], decoded[4], decoded[5], decoded[6] = Tensor, torch.UntypedStorage, torch.uint8, device.index
    return rebuild_cuda_tensor(*decoded)
