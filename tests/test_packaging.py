"""What a wheel asks of whoever installs and imports it: little."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
HEAVY = (
    "vllm",
    "ray",
    "peft",
    "bitsandbytes",
    "lm-eval",
    "flash-attn",
    "wandb",
    "mlflow-skinny",
    "trackio",
    "trl",
    "liger-kernel",
    "triton",
)


def name_of(requirement: str) -> str:
    return requirement.partition(";")[0].split("[")[0].split(">")[0].split("=")[0].split("<")[0].strip()


def test_importing_the_ops_costs_little_beyond_torch():
    """Below 1.5 s of processor time, so that a busy machine is not what is measured; it takes 0.06."""
    code = (
        "import time, torch; began = time.process_time(); "
        "from bbopd import CandidateTeacher, FullTeacher, SampledTeacher, TopKTeacher, linear_distill, linear_logprobs; "
        "import sys; print(time.process_time() - began); "
        "print([name for name in ('transformers', 'datasets', 'vllm', 'ray', 'pydantic', 'triton') if name in sys.modules])"
    )
    seconds, heavy = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert float(seconds) < 1.5
    assert heavy == "[]"


def test_a_plain_installation_is_light():
    plain = {name_of(requirement) for requirement in PROJECT["project"]["dependencies"]}
    assert not plain & set(HEAVY)
    extras = PROJECT["project"]["optional-dependencies"]
    assert {name_of(requirement) for requirements in extras.values() for requirement in requirements} >= set(HEAVY)


def test_wheels_are_built_for_every_python_that_is_promised():
    promised = {
        row.rpartition(" ")[2] for row in PROJECT["project"]["classifiers"] if row.startswith("Programming Language :: Python :: 3.")
    }
    built = PROJECT["tool"]["cibuildwheel"]["build"].split()
    assert built == [f"cp{version.replace('.', '')}-*" for version in sorted(promised)]
