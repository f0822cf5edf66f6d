"""Low-rank adapters: gradients of a dense merged model, one merged model everywhere, checkpoints and files of the adapters alone."""

from __future__ import annotations

import asyncio
import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from bbopd.config import LoRAConfig, StudentConfig, TrainConfig
from bbopd.data.streams import each
from bbopd.errors import CheckpointError, ModelError
from bbopd.modeling import add_lora, load_model, load_tokenizer, merge_lora, merged_weights, save_adapter
from bbopd.pipeline.student import load_student
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.hf import HFEngine
from bbopd.trainer import latest_checkpoint, load_checkpoint, parameter_groups, save_checkpoint
from bbopd.types import Prompt, Sampling
from tests.test_trainer import SHOWS_GRADIENT, make_trainer, padded_loss, sequences_and_batch
from tests.tiny_models import save_folder, tiny_gemma2, tiny_llama, tiny_qwen2, tiny_tokenizer

SMALL = LoRAConfig(rank=3, alpha=7.5)


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Keeps its matrices transposed (Conv1D), with biases and a tied head."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=320, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, resid_pdrop=0.0)
    config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config).eval()


def adapted(model, lora: LoRAConfig = SMALL, seed: int = 7):
    """``model`` with adapters that have been trained, as it were: B is not 0."""
    add_lora(model, lora, base="base")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def dense_weights(model) -> dict[str, torch.Tensor]:
    """Parameters of the merged model in float64, by W + alpha / rank * B A written out; differentiable in A and B."""
    found = {name: value.detach().double() for name, value in model.named_parameters() if "lora_" not in name}
    weights = {name.replace(".base_layer", ""): value for name, value in found.items()}
    leaves = {name: value.detach().double().requires_grad_() for name, value in model.named_parameters() if "lora_" in name}
    for name, a in leaves.items():
        if "lora_A" in name:
            layer = name.removesuffix(".lora_A.default.weight")
            product = leaves[name.replace("lora_A", "lora_B")] @ a * (SMALL.alpha / SMALL.rank)
            matrix = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = matrix + (product if matrix.shape == product.shape and "c_" not in layer else product.T)
    return weights | {f"leaf {name}": leaf for name, leaf in leaves.items()}


MAKERS = [tiny_llama, tiny_qwen2, tiny_gemma2, tiny_gpt2]


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("make", MAKERS)
def test_gradients_are_those_of_the_dense_merged_model(make, checkpointing):
    plain = make().double()
    model = adapted(make())
    sequences, teacher, batch = sequences_and_batch(seed=31)
    weights = dense_weights(model)
    leaves = {name.removeprefix("leaf "): weights.pop(name) for name in list(weights) if name.startswith("leaf ")}

    def dense(input_ids, attention_mask):  # row by row: in float64 the mask of padding alone is one that softmax makes NaN of
        rows = [ids[None, :length] for ids, length in zip(input_ids, attention_mask.sum(1).tolist(), strict=True)]
        logits = [torch.func.functional_call(plain, weights, kwargs={"input_ids": row}, tie_weights=True).logits[0] for row in rows]
        return SimpleNamespace(logits=torch.nn.utils.rnn.pad_sequence(logits, batch_first=True))

    expected = padded_loss(dense, sequences, [one.double() for one in teacher])
    expected.backward()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trainer = make_trainer(model, SHOWS_GRADIENT, activation_checkpointing=checkpointing)
    step = trainer.train_step([batch])
    assert step.loss == pytest.approx(float(expected.detach()), rel=1e-5)
    norm = torch.stack([leaf.grad.norm() for leaf in leaves.values()]).norm()
    assert step.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, value in model.named_parameters():
        if name in leaves:
            g = leaves[name].grad
            assert g.abs().max() > 0, name
            torch.testing.assert_close(value.double() - before[name].double(), -g / (g.abs() + 1.0), rtol=1e-3, atol=5e-6, msg=name)
        else:
            assert torch.equal(value, before[name]), name


def test_only_adapters_are_in_the_optimizer_and_both_matrices_decay():
    model = adapted(tiny_llama())
    trainer = make_trainer(model)
    trained = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert trained == {id(parameter) for name, parameter in model.named_parameters() if "lora_" in name}
    assert len(trained) == 2 * 7 * 2  # A and B of seven matrices in two layers
    assert not trainer.head.weight_VD.requires_grad
    for exempt in ("biases_and_norms", "biases"):
        decayed, free = parameter_groups(model, TrainConfig(decay_exempt=exempt))
        assert (len(decayed["params"]), len(free["params"])) == (28, 0)


@pytest.mark.parametrize("make", MAKERS)
def test_push_save_and_forward_are_one_model(make, tmp_path):
    model = adapted(make())
    ids = torch.randint(0, 262, (2, 9), generator=torch.Generator().manual_seed(1))
    own = model(input_ids=ids).logits
    pushed = make(seed=99)
    with torch.no_grad():
        targets = dict(pushed.named_parameters())
        sent = list(merged_weights(model))
        assert [name for name, _ in sent] == list(targets)
        for name, value in sent:
            targets[name].copy_(value)
    torch.testing.assert_close(pushed(input_ids=ids).logits, own, rtol=1e-4, atol=1e-4)
    exact = {name: value for name, value in dense_weights(model).items() if not name.startswith("leaf ")}
    for name, value in sent:
        torch.testing.assert_close(value.double(), exact[name].detach(), rtol=1e-6, atol=1e-6, msg=name)
    merge_lora(model)
    model.save_pretrained(tmp_path)
    saved = dict(AutoModelForCausalLM.from_pretrained(tmp_path).named_parameters())
    for name, value in pushed.named_parameters():
        assert torch.equal(saved[name], value), name
    assert [name for name, _ in model.named_parameters()] == list(targets)


def test_a_later_push_has_adapted_matrices_and_their_siblings_made_one_at_a_time():
    model = adapted(tiny_qwen2(), LoRAConfig(rank=2, target_modules=("q_proj", "v_proj")))
    names = [name for name, _ in merged_weights(model, changed_only=True)]
    parts = [f"{part}_proj.{kind}" for part in "qkv" for kind in ("weight", "bias")]
    expected = {f"model.layers.{layer}.self_attn.{part}" for layer in range(3) for part in [*parts, "o_proj.weight"]}
    assert len(names) == len(set(names))
    assert set(names) == expected
    everything = dict(merged_weights(model))
    own = {parameter.data_ptr() for parameter in model.parameters()}
    for name, value in merged_weights(model, changed_only=True):
        assert torch.equal(value, everything[name])
        assert (value.data_ptr() in own) != name.endswith(("q_proj.weight", "v_proj.weight"))  # all but these are no copies
    plain = tiny_llama()
    assert len(list(merged_weights(plain, changed_only=True))) == len(list(plain.parameters()))


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_an_engine_with_the_merged_weights_agrees_with_the_adapters(dtype, limit):
    model = adapted(tiny_llama())
    engine = HFEngine(tiny_llama(seed=5).to(dtype), eos_token_ids=(2,), pad_token_id=0)
    trainer = make_trainer(model)
    check = AgreementCheck(model, compute_dtype=dtype, tokens=500, limit=limit)

    async def written(version, **options):
        await engine.load_weights(trainer.weights(**options), version)
        prompts = [Prompt(f"p{index}", (5, 9 + index, 30)) for index in range(8)]
        return [rollout async for rollout in engine.generate(each(prompts), Sampling(24, seed=3))]

    figures = check(asyncio.run(written(0)), 0)
    assert figures["engine_compared_tokens"] > 60
    trainer.train_step([sequences_and_batch(seed=33)[2]])
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B["default"].weight.add_(0.3)  # so that the old weights would not do
    check(asyncio.run(written(1, changed_only=True)), 1)


# ---------------------------------------------------------------- checkpoints and files


def save(trainer, root: Path) -> Path:
    tokenizer, state = tiny_tokenizer(), {"steps": trainer.steps_done}
    return save_checkpoint(
        root, trainer.steps_done, model=trainer.model, tokenizer=tokenizer, optimizer=trainer.optimizer, state=state, keep=2
    )


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, dropout):
    def fresh(seed):
        torch.manual_seed(seed)
        return make_trainer(adapted(tiny_llama(), SMALL.model_copy(update={"dropout": dropout}), seed=seed), TrainConfig(lr=1e-2, warmup=0))

    whole, first = fresh(7), fresh(7)
    torch.manual_seed(1)
    expected = [whole.train_step([sequences_and_batch(seed=step)[2]]) for step in range(4)]
    torch.manual_seed(1)
    for step in range(2):
        first.train_step([sequences_and_batch(seed=step)[2]])
    folder = save(first, tmp_path)
    second = fresh(8)
    second.steps_done = load_checkpoint(latest_checkpoint(tmp_path), model=second.model, optimizer=second.optimizer)["steps"]
    found = [second.train_step([sequences_and_batch(seed=step)[2]]) for step in (2, 3)]
    assert [(one.loss, one.grad_norm) for one in found] == [(one.loss, one.grad_norm) for one in expected[2:]]
    for (name, a), (_, b) in zip(second.weights(), whole.weights(), strict=True):
        assert torch.equal(a, b), name
    adapters = sum(value.nbytes for name, value in first.model.named_parameters() if "lora_" in name)
    held = (folder / "model" / "adapter_model.safetensors").stat().st_size + (folder / "optimizer.safetensors").stat().st_size
    assert 3 * adapters < held < 3 * adapters + 20_000  # A and B, and two moments of each


def test_a_checkpoint_beside_other_frozen_weights_is_refused(tmp_path):
    folder = save(make_trainer(adapted(tiny_llama())), tmp_path)
    other = make_trainer(adapted(tiny_llama(seed=4)))
    before = {name: value.clone() for name, value in other.weights()}
    with pytest.raises(CheckpointError, match=r"beside other frozen weights than those of student\.model"):
        load_checkpoint(folder, model=other.model, optimizer=other.optimizer)
    assert all(torch.equal(value, before[name]) for name, value in other.weights())
    wider = make_trainer(adapted(tiny_llama(), LoRAConfig(rank=4)))
    with pytest.raises(CheckpointError, match="another model than the one to be trained"):
        load_checkpoint(folder, model=wider.model, optimizer=wider.optimizer)


def test_peft_reads_what_was_saved_and_a_saved_adapter_is_a_student(tmp_path):
    from peft import PeftModel

    base = save_folder(tmp_path / "base", tiny_llama(), tiny_tokenizer())
    student = StudentConfig(model=str(base), lora=SMALL, device="cpu")
    model = load_student(student, 0, True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    save_adapter(model, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    ids = torch.tensor([[4, 8, 15, 16, 23, 42]])
    expected = model(input_ids=ids).logits
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(by_peft(input_ids=ids).logits, expected, rtol=0, atol=0)

    merged = load_model(tmp_path / "adapter")
    torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert {name for name, _ in merged.named_parameters()} == {name for name, _ in tiny_llama().named_parameters()}
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert load_tokenizer(tmp_path / "adapter").get_vocab() == tiny_tokenizer().get_vocab()
    tiny_tokenizer((("o", "u"),)).save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(tmp_path / "adapter").get_vocab() != tiny_tokenizer().get_vocab()

    going_on = load_student(student.model_copy(update={"model": str(tmp_path / "adapter")}), 9, True)
    for (name, a), (_, b) in zip(going_on.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    for lora, message in (
        (LoRAConfig(rank=4, alpha=7.5), r"adapter of rank 3, and student\.lora\.rank is 4"),
        (LoRAConfig(rank=3, alpha=3), r"adapter of alpha 7\.5, and student\.lora\.alpha is 3"),
        (LoRAConfig(rank=3, alpha=7.5, target_modules=("q_proj",)), "the adapter has other layers than the model"),
    ):
        with pytest.raises(ModelError, match=message):
            load_student(student.model_copy(update={"model": str(tmp_path / "adapter"), "lora": lora}), 0, True)
    pruned = {"model": str(tmp_path / "adapter"), "init": {"keep_layers": [1]}}
    for lora in (None, SMALL):
        with pytest.raises(ModelError, match=r"the adapter has other layers than the model, such as .*layers\.1\."):
            load_student(StudentConfig.model_validate({**pruned, "lora": lora, "device": "cpu"}), 0, True)


def test_an_adapter_that_cannot_be_used_is_refused_by_name(tmp_path):
    save_adapter(adapted(tiny_llama()), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    def written(**changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **changes}))

    written(base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(ModelError, match="gone"):
        load_model(tmp_path)
    written(base_model_name_or_path=None)
    with pytest.raises(ModelError, match="does not say to which model the adapter belongs"):
        load_model(tmp_path)
    written(base_model_name_or_path=str(save_folder(tmp_path / "base")), peft_type="IA3")
    with pytest.raises(ModelError, match="adapter of kind IA3: only LORA"):
        load_model(tmp_path)
    written(base_model_name_or_path=str(tmp_path / "base"), use_dora=True)
    with pytest.raises(ModelError, match=r"cannot be trained on here \(use_dora\)"):
        load_student(StudentConfig(model=str(tmp_path), lora=SMALL, device="cpu"), 0, True)
    written(base_model_name_or_path=str(tmp_path / "base"))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(ModelError, match="the adapter cannot be read"):
        load_model(tmp_path)


# ---------------------------------------------------------------- errors


def test_targets_that_are_no_layers_are_refused_with_those_there_are():
    message = (
        r"names 'qproj', which is no linear layer in the body of LlamaForCausalLM: it has down_proj, gate_proj, k_proj, o_proj, q_proj"
    )
    with pytest.raises(ModelError, match=message):
        add_lora(tiny_llama(), LoRAConfig(target_modules=("v_proj", "qproj")), base="x")
    with pytest.raises(ModelError, match="names 'lm_head', which is no linear layer in the body"):
        add_lora(tiny_llama(), LoRAConfig(target_modules=("lm_head",)), base="x")
    with pytest.raises(ModelError, match="it has c_attn, c_fc, c_proj"):
        add_lora(tiny_gpt2(), LoRAConfig(target_modules=("q_proj",)), base="x")


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 0}, "rank\n.*greater than 0"),
        ({"alpha": 0}, "alpha\n.*greater than 0"),
        ({"dropout": 1.0}, "dropout\n.*less than 1"),
        ({"target_modules": []}, "no layer would be trained"),
    ],
)
def test_settings_that_train_nothing_are_refused(lora, message):
    with pytest.raises(ValidationError, match=message):
        LoRAConfig.model_validate(lora)


def test_without_peft_the_command_that_installs_it_is_named():
    code = (
        "import sys; sys.modules['peft'] = None\n"
        "from bbopd.config import LoRAConfig\n"
        "from bbopd.errors import ConfigError\n"
        "from bbopd.modeling import add_lora\n"
        "from tests.tiny_models import tiny_llama\n"
        "try: add_lora(tiny_llama(), LoRAConfig(), base='x')\n"
        "except ConfigError as error: print(error)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=400)
    assert "student.lora needs the package peft: pip install 'bbopd[lora]', or leave student.lora out" in found.stdout


def test_the_model_a_run_copies_is_left_alone():
    model = adapted(tiny_llama())
    twin = copy.deepcopy(model)
    merge_lora(twin)
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    torch.testing.assert_close(twin(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
