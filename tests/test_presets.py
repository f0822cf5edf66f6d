"""The presets of configs/: each fits the machine that it names, and runs from beginning to end with tiny models in place of its own."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from bbopd.cli.execute import execute
from bbopd.cli.main import main
from bbopd.config import RunConfig
from bbopd.config_file import parse_config, read_yaml
from bbopd.teachers.hf import HFBackend
from tests.openai_runs import served
from tests.openai_server import CHAT, OpenAIServer
from tests.serving import serving
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
PRESETS = ("7b", "13b", "30b", "fleet_topk", "chat_gad", "lora_24gb")
pytestmark = pytest.mark.timeout(600)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_fits_the_machine_that_it_names(name, capsys):
    command = next(line for line in (CONFIGS / f"{name}.yaml").read_text().splitlines() if "bbopd plan" in line)
    words = [str(CONFIGS.parent / word) if word.startswith("configs/") else word for word in shlex.split(command.removeprefix("#"))]
    assert main([*words[1:], "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"]
    assert told["memory"]["peak"] > 0.25 * told["gpu_bytes"], "a machine of its size"
    assert told["seconds_of_cycle"]["training"] > 0


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_with_tiny_models(name, tmp_path):
    config = read_yaml(CONFIGS / f"{name}.yaml")
    text = "\n\n\n".join(f"{n} the thin thing in there, then {n * n} more of them and so on" for n in range(40))
    (tmp_path / "text.txt").write_text(text)
    teacher = tiny_llama(vocab_size=262, seed=1)
    if config["teacher"].get("signal") == "text":
        tokenizer = tiny_tokenizer()
        backend = HFBackend(teacher, tokenizer, name="tiny")
        with served(OpenAIServer(backend, encode=lambda words: tokenizer(words)["input_ids"], ways=[CHAT])) as port:
            state = run_small(config, tmp_path, f"openai://127.0.0.1:{port}/v1")
    else:
        with serving(HFBackend(teacher, tiny_tokenizer(), name="tiny")) as servers:
            state = run_small(config, tmp_path, f"grpc://127.0.0.1:{servers[0].port}")
    assert state["status"] == "finished"
    assert state["tokens"]["sampled"] > 0
    assert state["tokens"]["trained"] > 0


def run_small(config: dict[str, Any], folder: Path, target: str) -> dict[str, Any]:
    """The preset with every size small, the models and the teacher's address of this test, and its rollouts by the hf engine."""
    teacher = {key: value for key, value in config["teacher"].items() if key not in ("tls", "token_env", "inflight_tokens", "model", "api")}
    teacher |= {"target": target, **({"answers": {"max_new_tokens": 8}} if teacher.get("signal") == "text" else {"topk": 20})}
    if "cache" in teacher:
        teacher["cache"] = {"path": str(folder / "answers.db")}
    samples = 4 if config["objective"]["name"] == "gad" else config["rollouts"]["samples_per_prompt"]
    kept = {key: config["rollouts"][key] for key in ("on_policy_fraction", "max_staleness") if key in config["rollouts"]}
    train = config["train"] | {"batch_tokens": 40, "micro_batch_tokens": 64, "max_seq_len": 48, "on_policy_tokens": 24}
    if "cold_start_tokens" in train:
        train["cold_start_tokens"] = 20
    small = {
        **config,
        "student": {**config["student"], "model": str(save_folder(folder / "model", tiny_llama(vocab_size=262), tiny_tokenizer()))},
        "teacher": teacher,
        "rollouts": {"per_update": 8, "samples_per_prompt": samples, "max_new_tokens": 10, **kept},
        "train": train,
        "data": {
            "prompts": [{"text": str(folder / "text.txt")}],
            "prompt_tokens": 8,
            "response_tokens": 10,
            "filters": {"min_tokens": 1, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 1, "rollouts": 1, "max_new_tokens": 4, "samples": 0},
        "output": str(folder / "run"),
    }
    assert execute(parse_config(small, [], RunConfig, "preset"), plain=True) == 0
    return dict(json.loads((folder / "run" / "summary.json").read_text()))
