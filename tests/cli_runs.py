"""Runs of the command line on tiny models: their file, their process, and what they leave behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from bbopd.config import ServeConfig
from bbopd.teachers.process import TeacherProcess

WORDS = [
    "the",
    "thing",
    "in",
    "the",
    "inner",
    "theory",
    "then",
    "thins",
    "into",
    "nothing",
    "and",
    "thereby",
    "the",
    "other",
    "end",
    "begins",
    "again",
    "within",
    "this",
    "thin",
    "line",
]


def bbopd(*words: str, **keywords) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "bbopd", *words], capture_output=True, text=True, timeout=240, check=False, env=environment(), **keywords
    )


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


@contextlib.contextmanager
def serving(model: Path, folder: Path) -> Iterator[dict[str, object]]:
    """The section ``teacher`` of a run whose teacher is there already: the one that `write_config` would have it start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", environment()["OMP_NUM_THREADS"])
        process = asyncio.run(TeacherProcess.start(ServeConfig(model=str(model)), folder / "teacher.log", timeout=120))
    try:
        yield {"serve": None, "target": process.target}
    finally:
        process.stop()


def write_config(folder: Path, model: Path, text: Path, **sections) -> Path:
    config = {
        "student": {"model": str(model), "init": {"keep_layers": [0, 3]}},
        "teacher": {"serve": {"model": str(model)}, "timeout": 60, "start_timeout": 120},
        "rollouts": {"per_update": 8, "max_new_tokens": 16, "max_staleness": 0},
        "objective": {"ramp": 0.2},
        "train": {
            "batch_tokens": 64,
            "micro_batch_tokens": 128,
            "max_seq_len": 64,
            "lr": 1e-3,
            "cold_start_tokens": 150,
            "on_policy_tokens": 400,
            "checkpoint_every": 2,
        },
        "data": {
            "prompts": [{"text": str(text), "weight": 1}],
            "prompt_tokens": 8,
            "response_tokens": 16,
            "filters": {"near_duplicates": 0.9, "charset": ["any"], "max_foreign": 0.3},
        },
        "eval": {"sequences": 4, "rollouts": 4, "max_new_tokens": 8},
        "output": str(folder / "run"),
    }
    for name, values in sections.items():
        config[name] = {**config.get(name, {}), **values}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steps(run: Path) -> list[dict]:
    if not (run / "metrics.jsonl").exists():
        return []
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]


def losses(run: Path) -> list[tuple]:
    return [(line["step"], line["loss"], line["ce"], line["kd"], line["rollout_tokens"]) for line in steps(run)]


def measures(run: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    return [(line["stage"], line["bits_per_byte"], line["kl_held_out"], line["kl_rollouts"]) for line in lines]
