"""Where and when a figure was taken."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

from bbopd.cpu_tensors import cpu_level
from bbopd.hardware import cpu_features


def describe() -> dict[str, str]:
    """A short name for the kind of machine, then processor, instruction sets, cores, threads, versions, date and command, for a record."""
    return {
        "machine": f"{re.sub('[^a-z0-9]+', '-', _processor().lower()).strip('-')}-{cpu_level()}",
        "processor": _processor(),
        "instruction_sets": " ".join(name for name, is_there in cpu_features().items() if is_there) or "none of those asked for",
        "cores": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "command": f"python -m pytest {shlex.join(sys.argv[1:])}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
