"""One training step of a whole small model, without an optimizer: how much the head and the loss add to its body.

Shape suffixes: ``N`` tokens, ``B`` sequences, ``L`` length, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from bbopd.cli.demo import find_model
from bbopd.errors import ModelError
from bbopd.modeling import load_model
from bbopd.modeling.layers import decoder
from benchmarks import distill
from benchmarks.cases import Case
from benchmarks.contest import Contestant, Step
from benchmarks.inputs import Inputs, make_teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RESIZES = False  # the model's sizes are its own
LENGTH = 1024
TEACHER_NOISE_SEED = 1


@dataclass(slots=True)
class ModelInputs:
    """``head`` carries the labels and the teacher; its hidden states are replaced by the body's own in each step."""

    model: PreTrainedModel
    token_ids: Tensor  # [B, L]
    grad_hidden: Tensor  # [N, D]
    head: Inputs

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        return tuple(self.model.parameters())

    def drop_gradients(self) -> None:
        self.model.zero_grad(set_to_none=True)


def smollm2(dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The model from the demo's GGUF file, or, without it, random weights of the same sizes; and which of the two it is."""
    try:
        return load_model(find_model(), dtype=dtype).train(), "trained weights"
    except ModelError:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
        return AutoModelForCausalLM.from_config(config, dtype=dtype).train(), "random weights"


def draw(case: Case) -> ModelInputs:
    return prepare_inputs(smollm2(getattr(torch, case.dtype))[0], case)


def prepare_inputs(model: PreTrainedModel, case: Case) -> ModelInputs:
    """Random tokens, and a top-k teacher that is the model's own head with noise."""
    generator = torch.Generator().manual_seed(0)
    length = min(LENGTH, case.N)
    ids_BL = torch.randint(0, case.V, (case.N // length, length), generator=generator)
    weight = model.get_output_embeddings().weight
    with torch.no_grad():
        hidden = body(model, ids_BL)
        noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(TEACHER_NOISE_SEED))
        size = case.teacher_noise / hidden.float().norm(dim=1).mean()
        teacher = make_teacher(case, hidden, (weight.float() + size * noise).to(weight.dtype))
    labels = ids_BL.roll(-1, dims=1).flatten()
    grad_hidden = torch.randn(hidden.shape, generator=generator).div_(hidden.shape[0]).to(hidden.dtype)
    return ModelInputs(model, ids_BL, grad_hidden, Inputs(case, hidden, weight, labels, None, teacher))


def body(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Hidden states [N, D] after the final norm."""
    return decoder(model)(input_ids=ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)


def body_alone(inputs: ModelInputs) -> Step:
    def step() -> None:
        body(inputs.model, inputs.token_ids).backward(inputs.grad_hidden)

    return step


def with_head(prepare: Callable[[Inputs], Step], inputs: ModelInputs) -> Step:
    """The body, then a contestant of `linear_distill` on its hidden states."""
    inner = prepare(inputs.head)

    def step() -> Tensor | None:
        inputs.head.hidden = body(inputs.model, inputs.token_ids)
        return inner()

    return step


FLOOR = Contestant("body alone", body_alone, has_loss=False, note="a random gradient fed to the hidden states")
CONTESTANTS = (
    FLOOR,
    *(
        Contestant(
            f"body + {one.name}", partial(with_head, one.prepare), one.missing, one.bytes_per_logit, one.is_compiled, is_peer=one.is_peer
        )
        for one in distill.CONTESTANTS
        if one.name.startswith("bbopd") or one.name in ("PyTorch eager", "torch.compile")
    ),
)
