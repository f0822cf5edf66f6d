"""Claim: `bbopd serve` scores top-64 with its tail at 0.85 or more of the speed of a plain forward pass of the same model."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path

import pytest
import torch

from bbopd.cli.demo import find_model
from bbopd.errors import ModelError
from benchmarks import rates
from benchmarks.conftest import QUICK_ROUNDS, ROUNDS
from benchmarks.scoring import SHAPES, VLLM_PYTHON, PlainForward, Shape, score_remotely, served

BBOPD, UNSHARED = "bbopd serve, top 64 and tail", "the same where every rollout has a prompt of its own"
VLLM = "bbopd serve with engine: vllm, by prompt_logprobs=64"


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_teacher(shape: Shape, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    rounds = request.config.getoption("rounds") or (QUICK_ROUNDS if request.config.getoption("quick") else ROUNDS)
    try:
        model = find_model()
    except ModelError as error:
        pytest.skip(str(error))
    plain = PlainForward()
    vllm = rates.Runner(VLLM, "its own scheduler and threads", "" if VLLM_PYTHON.exists() else "no .venv-vllm: make vllm")
    runners = [
        rates.Runner(PlainForward.name, "logits of every token, made and dropped"),
        rates.Runner(BBOPD, "over gRPC, checked by the client; a prompt is run once for both of its rollouts where one batch holds them"),
        rates.Runner(UNSHARED),
        vllm,
    ]
    with contextlib.ExitStack() as stack, asyncio.Runner() as loop:
        targets = dict.fromkeys((BBOPD, UNSHARED), stack.enter_context(served(model, tmp_path, sys.executable))[0])
        if not vllm.skipped:
            targets[VLLM] = stack.enter_context(served(model, tmp_path, VLLM_PYTHON, "engine=vllm", "levels=[topk]"))[0]
        able = [runner for runner in runners if not runner.skipped]
        for number in range(-1, rounds):  # the first warms up
            shared = shape.rollouts(plain.vocab_size, number + 1)
            own = shape.rollouts(plain.vocab_size, number + 10_001, is_shared=False)
            tokens = sum(len(rollout.all_ids) for rollout in shared)
            for place in range(len(able)):
                runner = able[(place + number) % len(able)]
                rollouts = own if runner.name == UNSHARED else shared
                if runner.name == PlainForward.name:
                    seconds = plain.score(rollouts)
                else:
                    seconds = loop.run(score_remotely(targets[runner.name], rollouts))
                if number >= 0:
                    runner.rates.append(tokens / seconds)
    threads = f"{torch.get_num_threads()} threads in the plain forward and in the server"
    print(rates.publish("teacher", f"SmolLM2-135M, {str(plain.dtype).removeprefix('torch.')}: {shape.name}", runners, threads).read_text())
