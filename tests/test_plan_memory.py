"""Planned memory against bytes of real tensors, and published sizes of known models."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from bbopd.config import LoRAConfig, StudentConfig, TrainConfig
from bbopd.errors import ConfigError
from bbopd.modeling import empty_model, packed_attention, packed_hidden, trained_bytes
from bbopd.modeling.shapes import measure_activations, shape_of
from bbopd.pipeline.student import empty_student, load_student
from bbopd.planning.machine import Machine
from bbopd.planning.plan import Planner
from bbopd.trainer.optimizer import build_optimizer
from tests.loop_rig import run_config
from tests.plans import CONFIGS, student_folder
from tests.tiny_models import save_folder, tiny_gemma2, tiny_llama, tiny_qwen2


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2.5-3b", 3_085_938_688),
        ("qwen2.5-7b", 7_615_616_512),
        ("qwen2.5-32b", 32_763_876_352),
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
    ],
)
def test_shapes_of_known_models_have_their_published_sizes(name, parameters):
    with torch.device("meta"):
        assert shape_of(empty_model(CONFIGS / "shapes" / f"{name}.json"), name).parameters == parameters


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LoRAConfig(rank=64)},
        {"lora": LoRAConfig(rank=64), "quantize": "nf4"},
        {"lora": LoRAConfig(rank=64), "quantize": "int8"},
    ],
    ids=["all weights", "lora", "nf4", "int8"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit"])
def test_weights_and_moments_are_planned_to_the_byte(tmp_path, options, optimizer):
    folder = student_folder(tmp_path, hidden=128, vocab_size=640)
    student = StudentConfig(model=str(folder), dtype="float32", **options)
    model = load_student(student, 0, True)
    train = TrainConfig(optimizer=optimizer, warmup=0)
    optimizer_now = build_optimizer(model, train)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer_now.step()
    held = [one for entry in optimizer_now.state.values() for one in entry.values() if torch.is_tensor(one) and one.ndim]
    moments = sum({one.data_ptr(): one.nbytes for one in held}.values())

    config = run_config(tmp_path / "run").model_copy(update={"student": student, "train": train})
    parts = {part.name: part.size for part in Planner().plan(config, Machine(1, None, None)).memory.parts}
    assert parts["weights"] == parts["gradients"] == trained_bytes(model)
    frozen = sum(one.nbytes for one in model.parameters() if not one.requires_grad)
    assert parts.get("frozen weights", 0) == frozen
    # codes have scales, and norms keep 32 bits: a few percent of a model as small as this
    assert parts["optimizer"] == pytest.approx(moments, rel=1e-9 if optimizer == "adamw" else 0.15)


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2, tiny_gemma2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_planned_as_a_real_pass_keeps_them(tmp_path, make, dtype, checkpointing):
    model = make()
    folder = save_folder(tmp_path / "model", model)
    lengths = [32] * 5 if make is tiny_gemma2 else [20, 33, 20, 47]  # Gemma's attention keeps its weights: more of longer sequences
    total = model.config.num_hidden_layers
    build = lambda layers: empty_model(folder, keep_layers=range(layers))  # noqa: E731
    planned = measure_activations(build, total, dtype, sequence_tokens=32, checkpointing=checkpointing)
    assert planned is not None
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    kept = _kept(model, lengths, dtype)
    assert planned.of_token * sum(lengths) + (0 if checkpointing else planned.cast_weights) == pytest.approx(kept, rel=0.05)
    assert checkpointing or planned.of_layer < planned.of_token


def _kept(model, lengths: list[int], dtype: torch.dtype) -> int:
    own = {one.untyped_storage().data_ptr() for one in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.arange(sum(lengths)) % 250
    positions = torch.cat([torch.arange(length) for length in lengths])
    boundaries = torch.tensor([0, *lengths]).cumsum(0)
    packed_hidden(model.eval(), ids, positions, boundaries)  # settles how the model is packed
    model.train()
    with packed_attention(model), torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16), saved_tensors_hooks(keep, keep):
        hidden = packed_hidden(model, ids, positions, boundaries)
    assert hidden.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_more_gpus_share_what_is_sharded_and_nothing_else(tmp_path):
    config = run_config(tmp_path / "run").model_copy(update={"student": StudentConfig(model=str(student_folder(tmp_path)))})
    one, four = ({part.name: part.size for part in Planner().plan(config, Machine(gpus, None, None)).memory.parts} for gpus in (1, 4))
    for name in ("weights", "optimizer"):
        assert four[name] == one[name] / 4
    for name in ("activations", "loss head", "libraries"):
        assert four[name] == one[name]
    assert four["whole student"] == one["weights"], "rank 0's own copy"


def test_what_several_ranks_cannot_train_is_refused_as_the_run_is(tmp_path):
    student = StudentConfig(model=str(student_folder(tmp_path)))
    config = run_config(tmp_path / "run").model_copy(update={"student": student})
    eight_bits = config.model_copy(update={"train": config.train.model_copy(update={"optimizer": "adamw_8bit"})})
    with pytest.raises(ConfigError, match=r"train\.optimizer=adamw_8bit cannot be trained by several ranks"):
        Planner().plan(eight_bits, Machine(2, None, None))


def test_adapters_over_ranks_are_planned_with_what_is_frozen_split_too(tmp_path):
    student = StudentConfig(model=str(student_folder(tmp_path)), lora=LoRAConfig(rank=4))
    config = run_config(tmp_path / "run").model_copy(update={"student": student})
    one, two = ({part.name: part.size for part in Planner().plan(config, Machine(gpus, None, None)).memory.parts} for gpus in (1, 2))
    assert two["weights"] == pytest.approx(one["weights"] / 2, rel=0.01)
    assert two["optimizer"] == pytest.approx(one["optimizer"] / 2, rel=0.01)


def test_an_empty_student_has_the_adapters_of_a_loaded_one(tmp_path):
    student = StudentConfig(model=str(student_folder(tmp_path)), lora=LoRAConfig(rank=4))
    with torch.device("meta"):
        empty = empty_student(student)
    loaded = load_student(student, 0, True)
    assert {name: one.shape for name, one in empty.named_parameters()} == {name: one.shape for name, one in loaded.named_parameters()}
