"""``python -m benchmarks.end_to_end``: whole on-policy updates (write, score, train) beside TRL's, on one machine.

Every contestant distils the same pruned student from the same teacher on the same prompts, as many rollouts an update, of as many tokens
at most, by forward KL at T = 1 with the same optimizer. Each is a process of its own, started in turn in every round, whose first update
(compiling, filling caches) is not counted. TRL's teacher is in its process; bbopd's is behind gRPC, in one of its own.

``--updates 2 --only bfloat16`` is a short look (one update counts); ``--results benchmarks/results`` keeps table, rows and every update.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import yaml

from benchmarks.contest import ROOT
from benchmarks.machine import describe

KEPT_LAYERS = tuple(range(0, 30, 2))
PROMPT_TOKENS = 48
LEARNING_RATE = 1e-6
TRL_SETTINGS = {
    "TRL, bfloat16 autocast": {"bf16": True},
    "TRL, bfloat16 weights": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
    "TRL, bfloat16 weights, static cache": {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}, "cache_implementation": "static"},
    "TRL, float32": {"bf16": False},
    "TRL, float32, static cache": {"bf16": False, "cache_implementation": "static"},
}


@dataclass(frozen=True, slots=True)
class Task:
    """What all contestants are given."""

    folder: Path  # holds teacher/, student/ and prompts.jsonl
    sequences: int  # of an update
    new_tokens: int
    updates: int  # the first is not counted


Measured = tuple[list[float], list[float], dict[str, float]]
"""Seconds and tokens of each update that counts, and seconds an update by stage."""


@dataclass(slots=True)
class Entry:
    """A contestant: the command of its process, which leaves one object a line, ``seconds`` and ``tokens``, for every update."""

    name: str
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    busy: dict[str, float] = field(default_factory=dict)
    """Seconds an update in which each stage of bbopd was at work, of the last round, the first update included; they may overlap."""
    skipped: str = ""

    @property
    def rate(self) -> float | None:
        """Trained tokens of rollouts a second, the median over updates."""
        rates = [tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True)]
        return statistics.median(rates) if rates else None


def prepare(folder: Path, options: argparse.Namespace) -> Task:
    """Teacher and student as folders of safetensors, and prompts of running text, of one length."""
    import torch

    from bbopd.cli.demo import find_model
    from bbopd.modeling import load_model, load_tokenizer

    source = find_model()
    tokenizer = load_tokenizer(source)
    for name, kept in (("teacher", None), ("student", KEPT_LAYERS)):
        load_model(source, keep_layers=kept, dtype=torch.float32).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    count = options.sequences * (options.updates + 1)
    texts = [tokenizer.decode(ids[:PROMPT_TOKENS]) for ids in _encoded(tokenizer, count)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return Task(folder, options.sequences, options.new_tokens, options.updates)


def _encoded(tokenizer: Any, count: int) -> list[list[int]]:
    """``count`` runs of text, each of ``PROMPT_TOKENS`` tokens or more."""
    found: list[list[int]] = []
    for text in topics.values():
        ids = tokenizer(text)["input_ids"]
        found += [ids[start : start + PROMPT_TOKENS] for start in range(0, len(ids) - PROMPT_TOKENS, 4 * PROMPT_TOKENS)]
        if len(found) >= count:
            return found[:count]
    raise ValueError(f"Python's topics make {len(found)} prompts, {count} are needed: ask for fewer updates or sequences")


def run_bbopd(task: Task, output: Path, python: str, settings: dict[str, dict[str, Any]]) -> Measured:
    """Seconds and tokens of each update that counts, of a `bbopd distill` as a user starts it, and how long its stages were at work."""
    tokens = task.sequences * task.new_tokens
    config: dict[str, dict[str, Any]] = {
        "student": {"model": str(task.folder / "student")},
        "teacher": {"serve": {"model": str(task.folder / "teacher"), "port": 0}, "signal": "full"},
        "rollouts": {
            "per_update": task.sequences,
            "samples_per_prompt": 1,
            "max_new_tokens": task.new_tokens,
            "on_policy_fraction": 1.0,
            "max_staleness": 1,
        },
        "objective": {"name": "forward_kl", "ce_weight": 0.0, "kd_weight": 1.0, "temperature": 1.0, "ramp": 0},
        "train": {
            "batch_tokens": tokens,
            "micro_batch_tokens": tokens,
            "max_seq_len": 512,
            "lr": LEARNING_RATE,
            "warmup": 0,
            "on_policy_tokens": 10 * tokens * task.updates,
            "total_steps": task.updates,
            "checkpoint_every": 1000,
        },
        "data": {
            "prompts": [{"jsonl": str(task.folder / "prompts.jsonl")}],
            "prompt_tokens": PROMPT_TOKENS,
            "filters": {"min_tokens": 0, "max_repetition": 1.0, "reject_duplicates": False},
        },
        "eval": {"sequences": 1, "rollouts": 1, "max_new_tokens": 1},
    }
    for section, values in settings.items():
        config[section] = {**config[section], **values}
    output.mkdir(parents=True)
    path = output / "run.yaml"
    path.write_text(yaml.safe_dump({**config, "output": str(output / "run")}))
    _call([python, "-m", "bbopd", "distill", str(path), "--plain"])
    lines = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    ends = [line["elapsed"] for line in lines]
    busy = json.loads((output / "run" / "summary.json").read_text())["busy_seconds"]
    by_stage = {stage: busy.get(stage, 0.0) / len(lines) for stage in ("sampling", "scoring", "training")}
    return [end - start for start, end in pairwise(ends)], [line["rollout_tokens"] for line in lines[1:]], by_stage


def run_trl(task: Task, output: Path, settings: dict[str, Any]) -> Measured:
    """The same of TRL's trainer."""
    output.mkdir(parents=True)
    request = {
        "folder": str(task.folder),
        "output": str(output),
        "updates": task.updates,
        "sequences": task.sequences,
        "settings": {
            "max_completion_length": task.new_tokens,
            "learning_rate": LEARNING_RATE,
            "beta": 0.0,
            **settings,
        },
    }
    _call([sys.executable, "-m", "benchmarks.trl_worker", json.dumps(request)])
    lines = [json.loads(line) for line in (output / "updates.jsonl").read_text().splitlines()][1:]
    return [line["seconds"] for line in lines], [line["tokens"] for line in lines], {}


def _call(command: list[str]) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        print("\n".join(said[-20:]), file=sys.stderr, flush=True)
        raise RuntimeError(f"exit status {done.returncode}: {said[-1] if said else 'nothing was said'}")


def contestants(task: Task, options: argparse.Namespace) -> dict[str, Any]:
    """Each one's name, and how it is run into a folder."""
    top_64 = {"teacher": {"signal": "topk", "topk": 64}}
    bfloat16 = {"student": {"model": str(task.folder / "student"), "dtype": "bfloat16"}}

    def of_bbopd(python: str, **settings: dict[str, Any]) -> Any:
        if "dtype" in settings.get("student", {}):
            settings["teacher"] = {
                "serve": {"model": str(task.folder / "teacher"), "port": 0, "dtype": "bfloat16"},
                **settings.get("teacher", {}),
            }
        return lambda output: run_bbopd(task, output, python, settings)

    found = {
        "bbopd, full teacher": of_bbopd(sys.executable),
        "bbopd, top-64 teacher": of_bbopd(sys.executable, **top_64),
        "bbopd, top-64 teacher, bfloat16": of_bbopd(sys.executable, **top_64, **bfloat16),
    }
    if options.vllm is not None:
        by_vllm = {"rollouts": {"engine": "vllm"}}
        found["bbopd, top-64 teacher, sampled by vLLM"] = of_bbopd(options.vllm, **top_64, **by_vllm)
        found["bbopd, top-64 teacher, bfloat16, sampled by vLLM"] = of_bbopd(options.vllm, **top_64, **bfloat16, **by_vllm)
    found |= {name: lambda output, values=values: run_trl(task, output, values) for name, values in TRL_SETTINGS.items()}
    return {name: run for name, run in found.items() if not options.only or any(word in name for word in options.only)}


def run_contest(task: Task, options: argparse.Namespace) -> list[Entry]:
    """Every contestant once a round, the order turning; one that fails is kept, with the reason."""
    able = contestants(task, options)
    entries = {name: Entry(name) for name in able}
    names = list(able)
    for number in range(options.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            entry = entries[name]
            if entry.skipped:
                continue
            try:
                seconds, tokens, entry.busy = able[name](task.folder / f"{names.index(name)}-{number}")
            except RuntimeError as error:
                entry.skipped = str(error)
                print(f"{name}: {error}", flush=True)
                continue
            entry.seconds += seconds
            entry.tokens += tokens
            stages = "".join(f", {stage} {value:.1f} s" for stage, value in entry.busy.items())
            print(f"{name}: {', '.join(f'{one:.1f}' for one in seconds)} s an update, {entry.rate:.0f} tokens/s{stages}", flush=True)
    return list(entries.values())


def describe_run(entries: list[Entry], task: Task, machine: dict[str, Any]) -> tuple[list[dict[str, Any]], str]:
    """A row for every contestant, and the table of them."""
    best_peer = max((entry.rate for entry in entries if entry.name.startswith("TRL") and entry.rate), default=None)
    rows = [
        {
            "contestant": entry.name,
            "updates": len(entry.seconds),
            "seconds": round(statistics.median(entry.seconds), 2) if entry.seconds else None,
            "tokens_per_second": round(entry.rate, 1) if entry.rate else None,
            "ratio": round(entry.rate / best_peer, 2) if entry.rate and best_peer else None,
            **{f"{stage}_seconds": round(entry.busy[stage], 2) if entry.busy else None for stage in ("sampling", "scoring", "training")},
            "skipped": entry.skipped,
            **machine,
        }
        for entry in entries
    ]
    lines = [
        "# Whole updates",
        "",
        f"{task.sequences} rollouts an update of at most {task.new_tokens} tokens after prompts of {PROMPT_TOKENS}; SmolLM2-135M teaches "
        f"{len(KEPT_LAYERS)} of its layers by forward KL at T = 1.",
        f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, Python {machine['python']}, {machine['date']}.",
        f"`{machine['command']}`",
        "",
        "Medians over updates, the first of each process left out; the ratio is to the fastest of TRL's settings. The last three columns:",
        "seconds an update in which a stage was at work, the first one included; stages overlap where vLLM samples.",
        "",
        "| | updates | seconds an update | tokens/s | ratio | sampling | scoring | training |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        names = ("updates", "seconds", "tokens_per_second", "ratio", "sampling_seconds", "scoring_seconds", "training_seconds")
        cells = [row["skipped"], *[""] * 6] if row["skipped"] else ["–" if row[name] is None else str(row[name]) for name in names]
        lines.append(f"| {row['contestant']} | {' | '.join(cells)} |")
    return rows, "\n".join(lines) + "\n"


def publish(entries: list[Entry], task: Task, results: Path | None) -> str:
    """The table. ``results`` also gets ``end_to_end.md``, ``.csv`` and, with every update, ``.json``, in this kind of machine's folder."""
    machine = describe(module="benchmarks.end_to_end")
    rows, table = describe_run(entries, task, machine)
    if results is not None:
        folder = results / machine["machine"]
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "end_to_end.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        every = {"machine": machine, "contestants": [asdict(entry) for entry in entries]}
        (folder / "end_to_end.json").write_text(json.dumps(every, indent=1) + "\n")
        (folder / "end_to_end.md").write_text(table)
    return table


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.split("\n\n")[0])
    parser.add_argument("--sequences", type=int, default=32, help="rollouts of an update (default 32)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens a rollout may have (default 128)")
    parser.add_argument("--updates", type=int, default=4, help="of each process, the first not counted (default 4)")
    parser.add_argument("--rounds", type=int, default=1, help="processes of each contestant (default 1)")
    parser.add_argument("--vllm", metavar="PYTHON", help="the interpreter of an environment with bbopd and vLLM (make vllm)")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="contestants whose name holds one of these")
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="keep <machine>/end_to_end.md, .csv and .json there")
    options = parser.parse_args(arguments)
    if options.updates < 2:
        parser.error(f"--updates {options.updates}: the first is not counted, so give 2 or more")
    options.results = options.results and options.results.resolve()
    return options


def main() -> int:
    options = parse(sys.argv[1:])
    with tempfile.TemporaryDirectory(prefix="bbopd-end-to-end-") as folder:
        task = prepare(Path(folder), options)
        entries = run_contest(task, options)
        print(publish(entries, task, options.results))
    return int(any(entry.skipped for entry in entries if entry.name.startswith("bbopd")))


if __name__ == "__main__":
    sys.exit(main())
