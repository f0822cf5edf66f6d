"""The student of a run: loaded the same from the same seed, with the tokens that end its answers, and room for them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from bbopd.config import RunConfig, StudentConfig
from bbopd.data.prompts import PromptSet
from bbopd.errors import ConfigError
from bbopd.modeling import add_lora, empty_model, load_model, max_positions, plain_sizes, resolve_device, trained_bytes
from bbopd.modeling.lora import adapter_base
from bbopd.trainer.optimizer import MOMENT_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def empty_student(config: StudentConfig, source: str | None = None) -> PreTrainedModel:
    """The student without values, on torch's device of now, adapters included. Matrices that would be quantised are plain ones.

    ``source`` is read in place of the model's own configuration.
    """
    model = empty_model(
        source or config.model,
        revision=config.revision if source is None else None,
        trust_remote_code=config.trust_remote_code,
        keep_layers=config.init.keep_layers,
    )
    if config.lora is not None:
        add_lora(model, config.lora, base=config.model)
    return model


def seed_generators(seed: int, deterministic: bool) -> None:
    """Those of Python, NumPy and torch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)


def load_student(config: StudentConfig, seed: int, deterministic: bool, is_split: bool = False) -> PreTrainedModel:
    """The student on its device, or in the host's memory where it is to be split over ranks; the generators begin at ``seed``."""
    seed_generators(seed, deterministic)
    source, revision, adapter = config.model, config.revision, None
    if config.lora is not None and (adapted := adapter_base(config.model)) is not None:
        (source, revision), adapter = adapted, Path(config.model).expanduser()
    model = load_model(
        source,
        device="cpu" if is_split else str(resolve_device(config.device)),
        attention=config.attention,
        revision=revision,
        trust_remote_code=config.trust_remote_code,
        keep_layers=config.init.keep_layers,
        quantize=config.quantize,
    )
    if config.lora is not None:
        add_lora(model, config.lora, base=source, adapter=adapter)
    return model


def trained_share(model: PreTrainedModel, optimizer: str) -> str:
    """How much of a student with adapters is trained, and what that leaves to be held beside the weights, for a person to read."""
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    whole = sum(plain_sizes(model)) - trained
    beside = 4 + MOMENT_BYTES[optimizer]  # bytes of a parameter's gradient and two moments
    return (
        f"LoRA: {trained:,} parameters are trained beside {whole:,} frozen ones ({trained / whole:.2%}); gradients and optimizer hold "
        f"{trained * beside / 1e6:,.1f} MB, where full training holds {whole * beside / 1e6:,.1f} MB{_frozen_share(model, whole)}"
    )


def _frozen_share(model: PreTrainedModel, whole: int) -> str:
    held = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
    return f"; what is frozen takes {held / 1e6:,.1f} MB, {whole * 4 / 1e6:,.1f} MB in float32" if held < whole * 4 else ""


def bytes_beside(config: RunConfig, model: PreTrainedModel) -> int:
    """Of what each checkpoint holds beside the student: a discriminator with two moments and a reference, or an average; 0 without them."""
    copies = 4 if config.objective.name == "gad" else 0
    if config.teacher.self is not None and config.teacher.self.weights == "ema":
        copies = 1
    return copies * trained_bytes(model)


def end_of_answer_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end an answer: the tokenizer's end of sequence, and what the model's generation settings add to it."""
    declared: Sequence[int] | int | None = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = [declared] if isinstance(declared, int) else list(declared or ())
    return tuple(dict.fromkeys([end_of_text(tokenizer), *ids]))


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ConfigError("the student's tokenizer names no token that ends a text (eos_token): its rollouts would never end")
    return int(tokenizer.eos_token_id)


def check_positions(config: RunConfig, model: PreTrainedModel, prompts: PromptSet) -> None:
    """Refuse a run whose longest sequence has no place among the model's positions. Raises `ConfigError`."""
    positions = max_positions(model)
    if positions is None:
        return
    if config.train.max_seq_len > positions:
        raise ConfigError(
            f"train.max_seq_len is {config.train.max_seq_len}, but {config.student.model} has {positions} positions: "
            f"set it to {positions} or less"
        )
    longest = max(len(prompt.token_ids) for prompt in prompts.known)
    if longest + config.eval.max_new_tokens > positions:
        raise ConfigError(
            f"the longest prompt has {longest} tokens, with eval.max_new_tokens {config.eval.max_new_tokens} that is more than the "
            f"{positions} positions of {config.student.model}: set eval.max_new_tokens to {positions - longest} or less"
        )
