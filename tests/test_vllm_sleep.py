"""An engine that sleeps between cycles, with the real vLLM, whose CPU build hears the calls and keeps its memory (make test-vllm)."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from bbopd.config import LoRAConfig
from bbopd.errors import EngineError, ModelError
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions
from bbopd.types import Sampling
from tests.cli_runs import WORDS, bbopd, steps, write_config
from tests.test_lora import adapted
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.test_vllm import tiny_prompts, write
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]

IGNORED = "sleep mode is not supported on CPU"  # vLLM's own words; once for falling asleep, and for waking weights and cache


@pytest.mark.parametrize("level", [1, 2])
async def test_an_engine_writes_with_new_weights_after_every_sleep(tmp_path, level):
    model = adapted(tiny_llama(hidden=128), LoRAConfig(rank=4, target_modules=("v_proj", "down_proj")))
    trainer = make_trainer(model)
    check = AgreementCheck(model, compute_dtype=torch.float32, tokens=2000)
    options = VLLMOptions(256, max_batch=8, sleep_level=level)
    engine = await VLLMEngine.start(model, options, eos_token_ids=(2,), folder=tmp_path)
    try:
        for version in range(3):
            await engine.load_weights(trainer.weights(changed_only=level == 1 and version > 0), version)
            rollouts = await write(engine, tiny_prompts([4, 8, 3, 5, 9, 2]), Sampling(40, seed=version))
            assert check(rollouts, version)["engine_compared_tokens"] > 60
            await engine.sleep()
            await engine.sleep()
            with pytest.raises(EngineError, match="is asleep: call load_weights"):
                await write(engine, tiny_prompts([4]), Sampling(4))
            trainer.train_step([sequences_and_batch(seed=version)[2]])
        if level == 2:
            with pytest.raises(ModelError, match="left out"):
                await engine.load_weights(trainer.weights(changed_only=True), 3)
    finally:
        await engine.close()
    calls = 3 * 1 + 2 * 2 + (level == 2)  # asleep; weights and cache awake; weights alone for the push that is refused
    assert (tmp_path / "vllm.log").read_text().count(IGNORED) == calls


def test_a_run_whose_engine_sleeps(tmp_path):
    save_folder(tmp_path / "model", tiny_llama(vocab_size=262, layers=4, hidden=128), tiny_tokenizer())
    texts = [" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40)]
    (tmp_path / "corpus.txt").write_text("\n\n\n".join(texts))
    rollouts = {"engine": "vllm", "agreement": {"tokens": 64}, "sleep": True, "max_staleness": 0}
    path = write_config(tmp_path, tmp_path / "model", tmp_path / "corpus.txt", rollouts=rollouts, student={"dtype": "float32"})
    result = bbopd("distill", str(path))
    assert result.returncode == 0, result.stderr
    run = tmp_path / "run"
    cycles = {line["cycle"] for line in steps(run) if line["phase"] == "on_policy"}
    assert max(line["engine_difference_max"] for line in steps(run) if "engine_difference_max" in line) < 1e-3
    events = json.loads((run / "trace.json").read_text())["traceEvents"]
    naps = sum("to sleep" in json.dumps(event) for event in events)
    assert naps >= len(cycles) > 2
    assert (run / "vllm.log").read_text().count(IGNORED) >= 3 * (naps - 1)
