"""Low-rank adapters by PEFT, put into a model in place: it stays the class it was, and only its adapters are trained.

An adapted linear layer computes ``(W + alpha / rank * B A) x`` (Hu et al. 2022, section 4.1) from its frozen ``W`` and two thin matrices.
Everything outside sees either the adapters alone (checkpoints, the optimizer) or the merged matrices (engines, the model that is saved).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from bbopd.config import LoRAConfig
from bbopd.errors import ModelError
from bbopd.extras import need
from bbopd.modeling.layers import decoder
from bbopd.modeling.quantized import QuantizedLinear, muted, plain_linear, plain_matrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_ADAPTER = "default"  # PEFT's name for the only one there is
_CONFIG = "adapter_config.json"
_TENSORS = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # PEFT's, before every name in its files


def add_lora(model: PreTrainedModel, lora: LoRAConfig, *, base: str, adapter: Path | None = None) -> None:
    """Freeze ``model`` and give its linear layers adapters, which change nothing until they are trained (B is 0).

    Parameters
    ----------
    base
        Where the model is from, to be named in the adapter's own files.
    adapter
        A folder with an adapter of the same rank, alpha and layers, whose values to start from.

    Raises
    ------
    ConfigError
        PEFT is not installed.
    ModelError
        A target that is no linear layer of the body, or an ``adapter`` that does not fit.
    """
    with muted():
        peft = need("peft", "student.lora", extra="lora")
    targets = _targets(model, lora.target_modules)
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(layer, Conv1D) for layer in _linear_layers(model).values()),  # GPT-2 keeps its matrices transposed
        task_type="CAUSAL_LM",
        base_model_name_or_path=os.path.abspath(base) if os.path.exists(base) else base,
    )
    model.requires_grad_(False)
    try:
        peft.inject_adapter_in_model(config, model, _ADAPTER)
    except ValueError as error:  # layers that PEFT knows to work without their forward, such as Mamba's
        raise ModelError(f"student.lora does not fit {type(model).__name__}: {error}") from error
    if adapter is not None:
        _start_from(model, adapter)


def is_adapted(model: nn.Module) -> bool:
    """Whether the model's trained weights are adapters, which `add_lora` has given it."""
    return "peft_config" in vars(model)


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by their names in the model; all float32, A [rank, in] and B [out, rank]."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def merged_weights(model: nn.Module, *, changed_only: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Names and values of the model's parameters as if it had no adapters: an adapted or quantised matrix is made when its turn comes, the
    others are the model's own. A tied one comes once.

    ``changed_only`` leaves out, of a model with adapters, what is frozen: all but adapted matrices and the parameters of their siblings,
    which come along since an engine may keep several as one (queries, keys and values).
    """
    adapted = dict(_adapted_layers(model))
    quantized = dict(_quantized_layers(model))
    parents = {_parent(name) for name in adapted}
    for name, parameter in model.named_parameters():
        plain = name.replace(".base_layer.", ".")
        layer, _, kind = plain.rpartition(".")
        if adapted and (parameter.requires_grad or (changed_only and _parent(layer) not in parents)):
            continue
        if layer in quantized and kind not in ("weight", "bias"):
            continue
        if kind != "weight" or (layer not in adapted and layer not in quantized):
            yield plain, parameter.detach()
        else:
            yield plain, _merged(adapted[layer]) if layer in adapted else quantized[layer].matrix()


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add the adapters to the frozen matrices, one at a time, and take them out: a model as it was before `add_lora`, but trained.

    Of a quantised model every matrix is made in float32 then, and lies on the CPU.
    """
    for name, layer in list(_adapted_layers(model)):
        base = layer.get_base_layer()
        if isinstance(base, QuantizedLinear):
            base = plain_linear(base, _merged(layer))
        else:
            base.weight.copy_(_merged(layer))
        _replace(model, name, base)
    for name, quantized in list(_quantized_layers(model)):
        _replace(model, name, plain_linear(quantized, quantized.matrix()))
    vars(model).pop("peft_config")


# ---------------------------------------------------------------- files


def save_adapter(model: nn.Module, folder: Path) -> None:
    """Write the adapters alone, in PEFT's format. Raises OSError or SafetensorError."""
    save_adapter_config(model, folder)
    tensors = {_PREFIX + _file_name(name): value.detach().contiguous().cpu() for name, value in adapter_parameters(model).items()}
    save_file(tensors, folder / _TENSORS, metadata={"format": "pt"})


def save_adapter_config(model: nn.Module, folder: Path) -> None:
    """What `save_adapter` writes beside the tensors. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    vars(model)["peft_config"][_ADAPTER].save_pretrained(str(folder))


def read_adapter(model: nn.Module, folder: Path) -> dict[str, Tensor]:
    """What `save_adapter` wrote, by the names of `adapter_parameters`; a name that the model does not have is left as it is in the file.

    Raises OSError or SafetensorError.
    """
    names = {_PREFIX + _file_name(name): name for name in adapter_parameters(model)}
    return {names.get(key, key): value for key, value in load_file(folder / _TENSORS).items()}


def adapter_base(source: str | os.PathLike[str]) -> tuple[str, str | None] | None:
    """Model and revision to which the adapter in a folder belongs; None where ``source`` is no such folder. Raises `ModelError`."""
    path = Path(source).expanduser() / _CONFIG
    if not path.is_file() or (path.parent / "config.json").exists():
        return None
    config = _read_config(path.parent)
    base = config.get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path} does not say to which model the adapter belongs: write its name or folder to base_model_name_or_path")
    return str(base), config.get("revision")


def merge_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Load any LoRA adapter in PEFT's format onto its base model and merge it in. Raises `ModelError`, and `ConfigError` without PEFT."""
    with muted():
        peft = need("peft", f"the adapter in {folder}", extra="lora")
    kind = _read_config(folder).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} holds an adapter of kind {kind}: only LORA can be merged here; merge it with PEFT, and give the result")
    config = peft.LoraConfig.from_pretrained(str(folder))
    config.inference_mode = True
    tuner = peft.LoraModel(model, {_ADAPTER: config}, _ADAPTER)
    found = peft.set_peft_model_state_dict(model, _without_prefix(peft.load_peft_weights(str(folder), device="cpu")))
    missing = [key for key in found.missing_keys if ".lora_" in key]
    if missing or found.unexpected_keys:
        _refuse(folder, [*missing, *found.unexpected_keys])
    tuner.merge_and_unload()
    vars(model).pop("peft_config", None)
    model.requires_grad_(True)


def _start_from(model: PreTrainedModel, folder: Path) -> None:
    wanted, saved = vars(model)["peft_config"][_ADAPTER], _read_config(folder)
    for option, now in (("rank", wanted.r), ("alpha", wanted.lora_alpha)):
        before = saved.get("r" if option == "rank" else "lora_alpha")
        if before != now:
            raise ModelError(
                f"{folder} holds an adapter of {option} {before}, and student.lora.{option} is {now}: set it to {before}; "
                "for a new adapter give the merged model as student.model"
            )
    unusual = [key for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias") if saved.get(key)]
    if unusual or saved.get("peft_type") != "LORA":
        said = ", ".join(unusual) or saved.get("peft_type")
        raise ModelError(
            f"{folder} holds an adapter that cannot be trained on here ({said}): merge it, and give the result as student.model"
        )
    try:
        values = read_adapter(model, folder)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the adapter cannot be read ({error})") from error
    parameters = adapter_parameters(model)
    odd = sorted(parameters.keys() ^ values.keys())
    if odd:
        _refuse(folder, odd)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _refuse(folder: Path, names: Iterable[str]) -> None:
    raise ModelError(
        f"{folder}: the adapter has other layers than the model, such as {min(names)}: "
        "give the target_modules and init.keep_layers that it was trained with"
    )


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / _CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder / _CONFIG} cannot be read ({error})") from error


def _file_name(parameter: str) -> str:
    return parameter.replace(f".{_ADAPTER}.", ".")


def _without_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(_PREFIX): value for key, value in tensors.items()}


# ---------------------------------------------------------------- layers


def _targets(model: PreTrainedModel, wanted: str | tuple[str, ...]) -> list[str]:
    """What PEFT is told: last names where they mean layers of the body alone, else full names."""
    layers = _linear_layers(model)
    known = sorted({name.rpartition(".")[2] for name in layers})
    names = known if wanted == "all-linear" else list(dict.fromkeys(wanted))
    for name in names:
        if name not in known:
            raise ModelError(
                f"student.lora.target_modules names {name!r}, which is no linear layer in the body of {type(model).__name__}: "
                f"it has {', '.join(known)}"
            )
    chosen = [name for name in layers if name.rpartition(".")[2] in names]
    everywhere = [name for name, _ in model.named_modules() if name.rpartition(".")[2] in names]
    return names if len(chosen) == len(everywhere) else chosen


def _linear_layers(model: PreTrainedModel) -> dict[str, nn.Module]:
    """Those of the body, by their names in the model."""
    of_body = {id(module) for module in decoder(model).modules()}
    return {name: one for name, one in model.named_modules() if id(one) in of_body and isinstance(one, nn.Linear | Conv1D)}


def _adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            yield name, module


def _quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """By their names in a model without adapters."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name.removesuffix(".base_layer"), module


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    model.get_submodule(_parent(name)).register_module(name.rpartition(".")[2], layer)


@torch.no_grad()
def _merged(layer: Any) -> Tensor:
    """The matrix that an adapted layer multiplies by, in the dtype of its frozen one."""
    weight = plain_matrix(layer.get_base_layer())
    return weight + layer.get_delta_weight(_ADAPTER).to(weight.dtype)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
