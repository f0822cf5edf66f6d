"""Frozen layers in few bits: values as their papers say, one model in training, sampling and every push, files and memory of adapters."""

from __future__ import annotations

import copy
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import AutoModelForCausalLM

from bbopd.config import LoRAConfig, StudentConfig, TrainConfig
from bbopd.errors import CheckpointError, ModelError
from bbopd.modeling import copy_of_trained, merge_lora, merged_weights, plain_sizes
from bbopd.modeling.quantized import Int8Linear, NF4Linear, QuantizedLinear, quantize_body
from bbopd.pipeline.student import load_student, trained_share
from bbopd.trainer import latest_checkpoint, load_checkpoint
from bbopd.trainer.stored import model_bytes
from tests.test_lora import adapted, save, tiny_gpt2
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.tiny_models import save_folder, tiny_llama, tiny_qwen2, tiny_tokenizer

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("kind", ["nf4", "int8"])
NF4 = (  # QLoRA, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def quantized(model, kind: str):
    quantize_body(model, kind, CPU)
    return model


def twin(model):
    """Ordinary layers with the matrices that the quantised ones multiply by; adapters as they are."""
    plain = copy.deepcopy(model)
    for name, layer in list(plain.named_modules()):
        if isinstance(layer, QuantizedLinear):
            ordinary = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            ordinary.weight = nn.Parameter(layer.matrix(), requires_grad=False)
            ordinary.bias = layer.bias
            parent, _, own = name.rpartition(".")
            plain.get_submodule(parent).register_module(own, ordinary)
    return plain


@pytest.mark.parametrize("shape", [(64, 128), (33, 17), (1, 3)])
def test_four_bits_are_the_nearest_of_normal_float_and_eight_the_nearest_of_a_row(shape):
    layer = nn.Linear(shape[1], shape[0], bias=False)
    layer.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    exact = layer.weight.detach().double()
    blocks = exact.flatten().split(64)
    codes = torch.tensor(NF4, dtype=torch.float64)
    expected = torch.cat([codes[(block[:, None] / block.abs().max() - codes).abs().argmin(1)] * block.abs().max() for block in blocks])
    found = NF4Linear(layer, CPU).matrix().double()
    # the scales themselves have eight bits, of their range around their mean
    scales = torch.tensor([float(block.abs().max()) for block in blocks], dtype=torch.float64)
    tolerance = 0.02 * float((scales - scales.mean()).abs().max()) + 1e-6
    torch.testing.assert_close(found, expected.view(shape), rtol=1e-6, atol=tolerance)

    step = exact.abs().amax(1, keepdim=True) / 127
    found = Int8Linear(layer, CPU).matrix().double()
    assert bool(((found - exact).abs() <= 0.57 * step).all())  # bitsandbytes divides in float16
    assert bool(((found / step - (found / step).round()).abs() < 0.1).all())


@KINDS
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2], ids=["llama", "biases"])
def test_it_trains_as_ordinary_layers_with_the_same_matrices_do(make, kind, compute_dtype):
    model = adapted(quantized(make(), kind))
    plain = twin(model)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 7 * len(model.model.layers)
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    steps = [
        [make_trainer(one, TrainConfig(lr=1e-3, warmup=0), compute_dtype=compute_dtype, activation_checkpointing=checkpointing)]
        for one, checkpointing in ((model, False), (plain, False), (copy.deepcopy(model), True))
    ]
    for runs in steps:
        runs += [runs[0].train_step([sequences_and_batch(seed=40 + step)[2]]) for step in range(3)]
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if compute_dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
    for runs in steps[1:]:
        for own, other in zip(steps[0][1:], runs[1:], strict=True):
            assert own.loss == pytest.approx(other.loss, rel=tolerance["rtol"])
            assert own.grad_norm == pytest.approx(other.grad_norm, rel=tolerance["rtol"])
    assert steps[0][3].loss != steps[0][1].loss


@KINDS
def test_training_sampling_pushing_and_saving_mean_the_same_weights(kind, tmp_path):
    model = adapted(quantized(tiny_qwen2(), kind), LoRAConfig(rank=3, alpha=7.5, target_modules=("q_proj", "down_proj")))
    ids = torch.randint(0, 262, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids).logits
        assert torch.equal(model.train()(input_ids=ids).logits, own)
        model.eval()
        assert torch.equal(copy_of_trained(model)(input_ids=ids).logits, own)
    pushed = tiny_qwen2(seed=99)
    targets = dict(pushed.named_parameters())
    sent = dict(merged_weights(model))
    assert list(sent) == list(targets)
    assert sorted(plain_sizes(model))[-len(targets) :] >= sorted(value.numel() for value in targets.values())
    with torch.no_grad():
        for name, value in sent.items():
            targets[name].copy_(value)
        torch.testing.assert_close(pushed(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    later = dict(merged_weights(model, changed_only=True))
    assert "model.layers.0.self_attn.k_proj.weight" in later
    assert "model.layers.0.input_layernorm.weight" not in later
    assert not any("scale" in name for name in later)
    held = model_bytes(model)
    merge_lora(model)
    assert sum(value.nbytes for value in (*model.parameters(), *model.buffers())) == held
    assert [name for name, _ in model.named_parameters()] == list(targets)
    model.save_pretrained(tmp_path)
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, value in sent.items():
        assert torch.equal(saved[name], value), name


@KINDS
def test_a_copy_shares_what_is_frozen(kind):
    model = adapted(quantized(tiny_llama(), kind))
    other = copy_of_trained(model)
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        assert (parameter is own[name]) != ("lora_" in name), name


def test_what_is_frozen_takes_an_eighth_in_four_bits_and_a_quarter_in_eight():
    body = {}
    for kind in (None, "nf4", "int8"):
        model = tiny_llama(hidden=128)
        whole = sum(plain_sizes(model))
        if kind is not None:
            quantize_body(model, kind, CPU)
        layers = [module for module in model.model.layers.modules() if isinstance(module, nn.Linear)]
        body[kind] = sum(parameter.nbytes for layer in layers for parameter in layer.parameters())
        assert sum(plain_sizes(model)) == whole
        if kind is not None:
            said = trained_share(adapted(model), "adamw_8bit")
            frozen = sum(parameter.nbytes for parameter in model.parameters() if not parameter.requires_grad)
            assert f"what is frozen takes {frozen / 1e6:,.1f} MB, {whole * 4 / 1e6:,.1f} MB in float32" in said
    assert body["nf4"] / body[None] == pytest.approx(4.127 / 32, rel=0.02)
    assert body["int8"] / body[None] == pytest.approx(8 / 32, rel=0.05)


@KINDS
def test_a_resumed_run_is_the_uninterrupted_one_and_other_bits_are_refused(kind, tmp_path):
    def fresh(seed, kind=kind):
        torch.manual_seed(seed)
        return make_trainer(adapted(quantized(tiny_llama(), kind), seed=seed), TrainConfig(lr=1e-2, warmup=0))

    whole, first = fresh(7), fresh(7)
    expected = [whole.train_step([sequences_and_batch(seed=step)[2]]) for step in range(4)]
    for step in range(2):
        first.train_step([sequences_and_batch(seed=step)[2]])
    folder = save(first, tmp_path)
    assert not (folder / "model" / "model.safetensors").exists()
    second = fresh(8)
    second.steps_done = load_checkpoint(latest_checkpoint(tmp_path), model=second.model, optimizer=second.optimizer)["steps"]
    found = [second.train_step([sequences_and_batch(seed=step)[2]]) for step in (2, 3)]
    assert [(one.loss, one.grad_norm) for one in found] == [(one.loss, one.grad_norm) for one in expected[2:]]
    for other in (fresh(7, kind="int8" if kind == "nf4" else "nf4"), make_trainer(adapted(tiny_llama()))):
        with pytest.raises(CheckpointError, match=r"other frozen weights.*student\.quantize back"):
            load_checkpoint(folder, model=other.model, optimizer=other.optimizer)


@KINDS
def test_a_student_is_loaded_so_and_an_adapter_of_it_goes_on(kind, tmp_path):
    base = save_folder(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    config = StudentConfig(model=str(base), lora=LoRAConfig(rank=2), quantize=kind, init={"keep_layers": [1]}, device="cpu")
    model = load_student(config, 0, True)
    assert all(isinstance(layer, QuantizedLinear) for layer in _bases(model))
    assert len(_bases(model)) == 7
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert all("lora_" in name for name in names)
    assert len(names) == 14
    again = load_student(config, 0, True)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def _bases(model) -> list[nn.Module]:
    return [layer.get_base_layer() for layer in model.modules() if hasattr(layer, "lora_A")]


def test_what_cannot_be_quantised_is_refused():
    with pytest.raises(ValidationError, match=r"quantize nf4 is for weights that are not trained: set lora too"):
        StudentConfig(model="x", quantize="nf4")
    with pytest.raises(ModelError, match="the body of GPT2LMHeadModel has no plain linear layers"):
        quantize_body(tiny_gpt2(), "nf4", CPU)


def test_without_bitsandbytes_the_command_that_installs_it_is_named():
    code = (
        "import sys; sys.modules['bitsandbytes'] = sys.modules['bitsandbytes.functional'] = None\n"
        "import torch\n"
        "from bbopd.config import TrainConfig\n"
        "from bbopd.errors import ConfigError\n"
        "from bbopd.modeling.quantized import quantize_body\n"
        "from bbopd.trainer import build_optimizer\n"
        "from tests.tiny_models import tiny_llama\n"
        "for attempt in (lambda: quantize_body(tiny_llama(), 'nf4', torch.device('cpu')),\n"
        "                lambda: build_optimizer(tiny_llama(), TrainConfig(optimizer='adamw_8bit'))):\n"
        "    try: attempt()\n"
        "    except ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    assert "student.quantize needs the package bitsandbytes: pip install 'bbopd[quantize]'" in found.stdout
    assert "train.optimizer adamw_8bit needs the package bitsandbytes: pip install 'bbopd[quantize]'" in found.stdout


def test_the_oracle_has_sixteen_rising_codes():
    assert len(NF4) == 16
    assert all(low < high for low, high in pairwise(NF4))
