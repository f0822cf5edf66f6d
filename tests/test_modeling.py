"""Loading, pruning, heads and fingerprints of real (tiny) models, and what is said about folders that are none."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, CohereConfig, CohereForCausalLM, GraniteConfig, GraniteForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from bbopd.errors import ModelError
from bbopd.modeling import (
    chat_template_sha256,
    compute_dtype,
    keep_layers,
    load_model,
    load_tokenizer,
    max_positions,
    output_head,
    resolve_device,
    tokenizer_sha256,
    vocabulary_sha256,
)
from bbopd.modeling.layers import decoder
from tests.tiny_models import save_folder, save_gguf, tiny_gemma2, tiny_llama, tiny_qwen2, tiny_tokenizer


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


# ---------------------------------------------------------------- loading


def test_a_saved_folder_comes_back_whole_and_quietly(tmp_path, capfd):
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    save_folder(tmp_path, model, tokenizer)
    capfd.readouterr()
    loaded = load_model(tmp_path)
    ids = torch.tensor([[3, 100, 319]])
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    assert not loaded.training
    assert load_tokenizer(tmp_path).encode("in the hé") == tokenizer.encode("in the hé")
    assert max_positions(loaded) == 256
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_gguf_file_is_the_model_it_was_made_from(tmp_path, capfd, tied):
    model, tokenizer = tiny_llama(tied=tied), tiny_tokenizer()
    path = save_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    capfd.readouterr()
    loaded, read = load_model(path), load_tokenizer(path)
    assert capfd.readouterr() == ("", "")
    ids = torch.tensor([[3, 100, 319, 7]])
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), rtol=1e-5, atol=1e-6)
    text = "the in hé<|im_end|>"
    assert read.encode(text, add_special_tokens=False) == tokenizer.encode(text, add_special_tokens=False)
    assert read.eos_token_id == tokenizer.eos_token_id
    assert vocabulary_sha256(read, len(tokenizer)) == vocabulary_sha256(tokenizer, len(tokenizer))
    loaded.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved"), ids), logits(loaded, ids))


def test_dtype_is_that_of_the_weights(tmp_path):
    assert load_model(save_folder(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_soft_capped_attention_is_never_dropped(tmp_path):
    save_folder(tmp_path, tiny_gemma2())
    assert load_model(tmp_path).config._attn_implementation == "eager"
    with pytest.raises(ModelError, match=r"soft-caps its attention at 2\.0"):
        load_model(tmp_path, attention="sdpa")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "without config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights \(\*\.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000]), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "no-such-thing"}'), "cannot be read"),
    ],
)
def test_a_spoilt_folder_is_refused(tmp_path, spoil, message):
    spoil(save_folder(tmp_path))
    with pytest.raises(ModelError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_missing_tensors_are_not_filled_with_random_ones(tmp_path):
    save_folder(tmp_path, tiny_llama(layers=2))
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ModelError, match=r"lack 9 tensors that LlamaForCausalLM needs, such as model\.layers\.2\."):
        load_model(tmp_path)


def test_tensors_of_another_size_are_refused(tmp_path):
    save_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 65}))
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"no tokenizer \(tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.gguf", None, "there is no file"),
        ("html.gguf", b"<html>not found</html>", "does not begin as a GGUF file"),
        ("cut.gguf", b"GGUF\x03\x00\x00\x00\x05", "cannot be read"),
    ],
)
def test_a_broken_gguf_file_is_refused(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message):
        load_model(path)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match="there is no folder"):
        load_model(str(tmp_path / "nothing"))
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="neither a folder nor"):
        load_model(tmp_path / "file")


def test_a_hub_that_is_not_reached_says_so_and_what_else_there_is():
    script = "from bbopd.modeling import load_model; load_model('nobody/no-such-model')"
    run = subprocess.run(
        [sys.executable, "-c", script], env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=400
    )
    message = run.stderr.strip().splitlines()[-1]
    assert message.startswith(
        "bbopd.errors.ModelError: nobody/no-such-model is no folder here, and the model cannot be fetched from the hub"
    )
    assert message.endswith("or give a local folder or .gguf file; for a copy in the hub cache set HF_HUB_OFFLINE=1")


def test_devices_and_dtypes():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda")
    with pytest.raises(ModelError, match="device 'gpu' is none that PyTorch knows"):
        resolve_device("gpu")
    assert compute_dtype("bfloat16", "cpu") == torch.bfloat16
    assert compute_dtype("float32", "cpu") == torch.float32
    with pytest.raises(ModelError, match="'float16' is not one of auto, float32, bfloat16"):
        compute_dtype("float16", "cpu")


# ---------------------------------------------------------------- pruning


@pytest.mark.parametrize("layers", [[0, 3], [1, 2], [2]])
@pytest.mark.parametrize("make", [lambda: tiny_llama(layers=4), tiny_gemma2], ids=["llama", "gemma2"])
def test_kept_layers_are_the_ones_asked_for_and_save_and_generate(tmp_path, make, layers):
    model = make()
    expected = [{k: v.clone() for k, v in decoder(model).layers[index].state_dict().items()} for index in layers]
    kinds = getattr(model.config, "layer_types", None)
    kinds = kinds and [kinds[index] for index in layers]
    keep_layers(model, layers)
    assert model.config.num_hidden_layers == len(layers)
    assert getattr(model.config, "layer_types", None) == kinds
    for layer, state in zip(decoder(model).layers, expected, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    ids = torch.arange(3, 15)[None]  # longer than the sliding window
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
    written = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    for length in range(12, 20):  # the cache must give what a pass without it gives
        step = logits(model, written[:, :length])[0, -1]
        step[model.generation_config.eos_token_id] = -torch.inf
        assert step.argmax() == written[0, length]


def test_keep_layers_while_loading(tmp_path):
    model = tiny_llama(layers=3)
    loaded = load_model(save_folder(tmp_path, model), keep_layers=(0, 2))
    keep_layers(model, [0, 2])
    ids = torch.tensor([[4, 5, 6]])
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("layers", [[], [0, 4], [1, 0], [-1], [0, 0]])
def test_layers_that_do_not_fit_are_refused(layers):
    with pytest.raises(ModelError, match="does not fit a model of 4 layers: give rising indices from 0 to 3"):
        keep_layers(tiny_llama(layers=4), layers)


# ---------------------------------------------------------------- heads


def tiny_of(kind, config_kind, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ends = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 2}
    return kind(config_kind(**sizes, **ends, num_key_value_heads=2, **options)).eval()


@pytest.mark.parametrize(
    ("make", "scale", "softcap"),
    [
        (tiny_llama, 1.0, None),
        (tiny_qwen2, 1.0, None),
        (tiny_gemma2, 1.0, 3.0),
        (lambda: tiny_of(CohereForCausalLM, CohereConfig, logit_scale=0.25), 0.25, None),
        (lambda: tiny_of(GraniteForCausalLM, GraniteConfig, logits_scaling=8.0), 0.125, None),
    ],
    ids=["llama", "qwen2", "gemma2", "cohere", "granite"],
)
def test_the_head_gives_the_models_own_logits(make, scale, softcap):
    model = make()
    head = output_head(model)
    assert (head.logit_scale, head.logit_softcap) == (scale, softcap)
    assert head.weight_VD is model.get_output_embeddings().weight
    ids = torch.tensor([[7, 8, 9, 250]])
    hidden = decoder(model)(input_ids=ids).last_hidden_state[0]
    torch.testing.assert_close(head.logits(hidden), model(input_ids=ids).logits[0], rtol=1e-5, atol=1e-6)


def test_a_bfloat16_model_is_not_refused_for_its_rounding():
    assert output_head(tiny_gemma2().bfloat16()).logit_softcap == 3.0


def test_a_bias_belongs_to_the_head():
    model = tiny_llama(tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(320))
    assert output_head(model).bias is model.lm_head.bias


class ScaledLlama(type(tiny_llama())):
    """Its logits are not what its config says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.05
        return output


def test_a_head_that_does_something_unknown_is_refused():
    with pytest.raises(ModelError, match="ScaledLlama does not compute its logits as"):
        output_head(ScaledLlama(tiny_llama().config))


# ---------------------------------------------------------------- fingerprints


def hash_entries(entries: list[tuple[int, bytes]]) -> str:
    return hashlib.sha256(b"".join(struct.pack("<II", index, len(raw)) + raw for index, raw in entries)).hexdigest()


def test_byte_level_tokens_are_hashed_as_the_bytes_they_stand_for():
    texts = [b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>", *(bytes([byte]) for byte in bytes_to_unicode()), b"th", b"the", b"in"]
    tokenizer = tiny_tokenizer()
    assert vocabulary_sha256(tokenizer, 320) == hash_entries(list(enumerate(texts)))
    assert vocabulary_sha256(tokenizer, 100) == hash_entries(list(enumerate(texts))[:100])
    assert vocabulary_sha256(tokenizer, 512) == vocabulary_sha256(tokenizer, 262)  # padding rows change nothing


def test_sentencepiece_tokens_are_hashed_as_the_bytes_they_stand_for():
    pieces = {"<unk>": 0, "<0x0A>": 1, "▁": 2, "a": 3, "▁a": 4, "é": 5}
    backend = Tokenizer(models.BPE(vocab=pieces, merges=[("▁", "a")], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    expected = [b"<unk>", b"\n", b" ", b"a", b" a", "é".encode()]
    assert vocabulary_sha256(tokenizer, 6) == hash_entries(list(enumerate(expected)))


def test_fingerprints_survive_saving_and_see_changes(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    tiny_llama().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    loaded(["a", "bcd"], padding=True, truncation=True, max_length=2)  # leaves its padding and truncation set
    other = tiny_tokenizer(merges=(("t", "h"), ("th", "e"), ("i", "s")))
    assert vocabulary_sha256(loaded, 320) == vocabulary_sha256(tokenizer, 320) != vocabulary_sha256(other, 320)
    assert tokenizer_sha256(loaded) == tokenizer_sha256(tokenizer) != tokenizer_sha256(other)
    assert chat_template_sha256(loaded) == chat_template_sha256(tokenizer) != ""
    other.chat_template = None
    assert chat_template_sha256(other) == ""
