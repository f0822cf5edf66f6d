"""Options of the student: the model that learns, how it starts, and which of its weights are trained."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bbopd.config_base import Positive, Section


class InitConfig(Section):
    """How the student starts."""

    keep_layers: tuple[int, ...] | None = None
    """Layers of the model to keep, in order; the others are dropped. None keeps all."""

    @field_validator("keep_layers", mode="before")
    @classmethod
    def _expand_ranges(cls, value: Any) -> Any:
        """Accept ``[0, 1, 2]`` or ``"0-11,22-29"``."""
        if not isinstance(value, str):
            return value
        layers: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            try:
                layers.extend(range(int(first), int(last or first) + 1))
            except ValueError:
                raise ValueError(f"{part.strip()!r} is neither a layer nor a range such as 0-11") from None
        return layers

    @field_validator("keep_layers")
    @classmethod
    def _check_order(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value)) or value[0] < 0):
            raise ValueError("layers must be given in rising order, each once, at least one")
        return value


class LoRAConfig(Section):
    """Train low-rank adapters beside frozen weights (Hu et al. 2022): ``W + alpha / rank * B A``. Needs the extra ``bbopd[lora]``.

    The defaults are those of Schulman et al. 2025, "LoRA Without Regret", who find the best learning rate about ten times that of full
    training.
    """

    rank: Positive = 32
    """Rows of A and columns of B."""
    alpha: Annotated[float, Field(gt=0)] = 32.0
    """The factor of an adapter's output is ``alpha / rank``."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of what goes into the adapters, while training."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers of the body that get an adapter, by their last names (``[q_proj, v_proj]``); the output head has none."""

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not value:
            raise ValueError("no layer would be trained: name some, such as [q_proj, v_proj], or all-linear")
        return value


class StudentConfig(Section):
    """The model that learns."""

    model: str
    """Hub id, folder, or a GGUF file; or a folder with a LoRA adapter in PEFT's format, which goes on being trained where ``lora`` is
    set, and is merged into its base model otherwise."""
    init: InitConfig = InitConfig()
    """What is left out of the model before it learns."""
    lora: LoRAConfig | None = None
    """None trains all weights."""
    quantize: Literal["nf4", "int8"] | None = None
    """How the linear layers of the body are held, which are frozen beside ``lora``: in 4.13 bits a weight (QLoRA) or in 8, where None is
    32. Needs the extra ``bbopd[quantize]``."""
    revision: str | None = None
    """A commit, tag or branch on the hub; None: the main one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights are always float32. ``auto``: bfloat16 where the hardware multiplies it, else float32."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``cuda:1``; ``auto`` takes a GPU where there is one."""
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    """How attention is computed; ``auto`` takes flash-attn on a GPU where it is installed, else PyTorch's own."""
    activation_checkpointing: bool = False
    """Keep only what enters each layer, and compute the rest again in the backward pass: less memory, more time."""
    trust_remote_code: bool = False
    """Load code that the model's files name. It runs with all your rights."""

    @model_validator(mode="after")
    def _quantized_is_frozen(self) -> StudentConfig:
        if self.quantize is not None and self.lora is None:
            raise ValueError(f"quantize {self.quantize} is for weights that are not trained: set lora too ({{}} will do), or leave it out")
        return self
