"""Where and when a figure was taken."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import torch

from bbopd.cpu_tensors import cpu_level
from bbopd.hardware import cpu_features


def describe(device: str = "cpu", module: str = "pytest", arguments: list[str] | None = None) -> dict[str, str]:
    """A short name for the kind of machine, then processor, instruction sets, cores, threads, versions, date and command, for a record."""
    return {
        **(_gpu() if device == "cuda" else _cpu()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m {module} {shlex.join(sys.argv[1:] if arguments is None else arguments)}".rstrip(),
    }


def _cpu() -> dict[str, str]:
    return {
        "machine": f"{_slug(_processor())}-{cpu_level()}",
        "processor": _processor(),
        "instruction_sets": " ".join(name for name, is_there in cpu_features().items() if is_there) or "none of those asked for",
        "cores": str(os.cpu_count()),
    }


def _gpu() -> dict[str, str]:
    """The card, the architecture that kernels are compiled for, its multiprocessors, and what is between it and Python."""
    card = torch.cuda.get_device_properties(0)
    return {
        "machine": _slug(card.name),
        "processor": f"{card.name}, {card.total_memory / 2**30:.0f} GiB",
        "instruction_sets": f"sm_{card.major}{card.minor}",
        "cores": str(card.multi_processor_count),
        "driver": f"{_driver()}, CUDA {torch.version.cuda}",
        "triton": next((one.version for one in metadata.distributions() if one.name == "triton"), "not installed"),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return told[0] if told else "unknown"


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
