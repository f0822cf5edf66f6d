"""The examples, run as a reader runs them: the fused loss is the ordinary one, in less memory."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
LINE = re.compile(r"^(before|after) +loss ([\d.]+) -> ([\d.]+) +([\d.]+) s a step +([\d,]+) MiB", re.MULTILINE)


class Measured(NamedTuple):
    losses: tuple[float, float]
    seconds: float
    mebibytes: float


def run(*words: str) -> dict[str, Measured]:
    """What an example printed of each way."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=280, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = LINE.findall(done.stdout)
    assert found, done.stdout
    return {name: Measured((float(a), float(b)), float(spent), float(most.replace(",", ""))) for name, a, b, spent, most in found}


def hold(before: Measured, after: Measured) -> None:
    assert after.losses == pytest.approx(before.losses, rel=1e-3)
    assert after.losses[1] < after.losses[0]
    assert after.mebibytes < 0.7 * before.mebibytes


def test_plain_pytorch():
    ways = run(str(EXAMPLES / "plain_pytorch.py"), "--vocabulary", "8000", "--sequences", "8", "--width", "32", "--steps", "2")
    hold(ways["before"], ways["after"])


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="TRL is not installed: pip install 'bbopd[examples]'")
def test_in_trl():
    ways = run(str(EXAMPLES / "trl_distillation.py"))
    hold(ways["before"], ways["after"])


@pytest.mark.slow
def test_over_fsdp():
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
    ways = {}
    for way in ("before", "after"):
        ways |= run(*torchrun, str(EXAMPLES / "fsdp_loop.py"), "--loss", way)
    hold(ways["before"], ways["after"])
