"""The contestants of the scoring benchmark: the same sequences through a plain forward pass, and through `bbopd serve` to its client."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from bbopd.modeling import compute_dtype
from bbopd.teachers.remote import RemoteTeacher
from bbopd.types import Prompt, Rollout, SignalSpec
from benchmarks.contest import ROOT
from benchmarks.training_step import smollm2

WANT = SignalSpec("topk", 1.0, 64)
BATCH_TOKENS = 2048  # of one forward pass, as `bbopd serve` has it by default
SAMPLES = 2  # of each prompt
VLLM_PYTHON = ROOT / ".venv-vllm" / "bin" / "python"


@dataclass(frozen=True, slots=True)
class Shape:
    """Lengths of a prompt and of each of its answers; random tokens."""

    prompt: int
    answer: int
    prompts: int

    @property
    def name(self) -> str:
        return f"{SAMPLES * self.prompts} rollouts, {SAMPLES} of each prompt, of {self.prompt} + {self.answer} tokens"

    def rollouts(self, vocab_size: int, seed: int, *, is_shared: bool = True) -> list[Rollout]:
        """Different ones for every seed, as no server need answer the same question again; or each with a prompt of its own."""
        generator = torch.Generator().manual_seed(seed)
        made = []
        for number in range(self.prompts):
            prompt = Prompt(f"p{number}", _tokens(self.prompt, vocab_size, generator))
            for sample in range(SAMPLES):
                if sample and not is_shared:
                    prompt = Prompt(f"p{number}-{sample}", _tokens(self.prompt, vocab_size, generator))
                made.append(Rollout(f"r{number}-{sample}", prompt, _tokens(self.answer, vocab_size, generator)))
        return made


SHAPES = (Shape(128, 128, 16), Shape(512, 128, 8))


class PlainForward:
    """transformers' own forward pass, logits and all, over padded batches of `BATCH_TOKENS`."""

    name = "transformers, forward alone"
    dtype = compute_dtype("auto", "cpu")  # as `bbopd serve` loads it

    def __init__(self) -> None:
        self._model = smollm2(self.dtype)[0].eval()
        self.vocab_size = int(self._model.config.vocab_size)

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout]) -> float:
        """Seconds for all of them."""
        start = time.perf_counter()
        batch: list[Rollout] = []
        for rollout in rollouts:
            if sum(len(one.all_ids) for one in [*batch, rollout]) > BATCH_TOKENS:
                self._forward(batch)
                batch = []
            batch.append(rollout)
        self._forward(batch)
        return time.perf_counter() - start

    def _forward(self, batch: Sequence[Rollout]) -> None:
        width = max(len(rollout.all_ids) for rollout in batch)
        ids = torch.tensor([[*rollout.all_ids, *[0] * (width - len(rollout.all_ids))] for rollout in batch])
        mask = torch.tensor([[1] * len(rollout.all_ids) + [0] * (width - len(rollout.all_ids)) for rollout in batch])
        self._model(input_ids=ids, attention_mask=mask, use_cache=False)


async def score_remotely(target: str, rollouts: Sequence[Rollout]) -> float:
    """Seconds from the first question to the last answer."""
    teacher = await RemoteTeacher.connect(target)
    try:
        start = time.perf_counter()
        count = 0
        async for _ in teacher.score(_stream(rollouts), WANT):
            count += 1
        seconds = time.perf_counter() - start
    finally:
        await teacher.close()
    if count != len(rollouts) or teacher.counters.total():
        raise RuntimeError(f"{count} of {len(rollouts)} came back, with {dict(teacher.counters)}")
    return seconds


@contextlib.contextmanager
def served(model: Path, folder: Path, python: str | Path, *settings: str) -> Iterator[tuple[str, int]]:
    """The address and process id of a ``bbopd serve`` of its own."""
    ready = folder / f"ready-{len(list(folder.iterdir()))}"
    command = [str(python), "-m", "bbopd", "serve", "--model", str(model), "--port", "0", "--ready-file", str(ready)]
    for setting in settings:
        command += ["--set", setting]
    with (folder / f"{ready.name}.log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT) as process:
        try:
            while not ready.exists():
                if process.poll() is not None:
                    raise RuntimeError(f"bbopd serve ended with {process.returncode}: {Path(log.name).read_text()[-1000:]}")
                time.sleep(0.1)
            yield ready.read_text().strip(), process.pid
        finally:
            process.terminate()
            process.wait()


def _tokens(count: int, vocab_size: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(0, vocab_size, (count,), generator=generator).tolist())


async def _stream(rollouts: Sequence[Rollout]) -> AsyncIterator[Rollout]:
    for rollout in rollouts:
        yield rollout
