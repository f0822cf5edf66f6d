"""A student with adapters and the real vLLM: merged weights, of which the frozen ones are pushed once (make test-vllm)."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from bbopd.config import LoRAConfig
from bbopd.rollouts.agreement import AgreementCheck
from bbopd.rollouts.vllm import VLLMEngine, VLLMOptions
from bbopd.types import Sampling
from tests.test_lora import adapted
from tests.test_trainer import make_trainer, sequences_and_batch
from tests.test_vllm import tiny_prompts, write
from tests.tiny_models import tiny_llama, tiny_qwen2

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]


@pytest.mark.parametrize(("make", "dtype"), [(tiny_llama, torch.float32), (tiny_qwen2, torch.bfloat16)])
async def test_pushes_of_what_has_changed_keep_engine_and_adapters_in_agreement(tmp_path, make, dtype):
    """A tied head, and biases; v_proj alone is adapted of the three matrices that vLLM keeps as one."""
    model = adapted(make(hidden=128), LoRAConfig(rank=4, target_modules=("v_proj", "down_proj")))
    trainer = make_trainer(model)
    check = AgreementCheck(model, compute_dtype=dtype, tokens=2000)
    engine = await VLLMEngine.start(model, VLLMOptions(256, dtype=dtype, max_batch=8), eos_token_ids=(2,), folder=tmp_path)
    try:
        for version in range(3):
            await engine.load_weights(trainer.weights(changed_only=version > 0), version)
            rollouts = await write(engine, tiny_prompts([4, 8, 3, 5, 9, 2]), Sampling(40, seed=version))
            assert check(rollouts, version)["engine_compared_tokens"] > 60
            trainer.train_step([sequences_and_batch(seed=version)[2]])
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:
                        parameter.mul_(-1.5)  # far from what the engine has
    finally:
        await engine.close()
    assert "Failed to load weights" not in (tmp_path / "vllm.log").read_text()  # of layers that a push leaves out
