"""Both ops can be captured in a CUDA graph: nothing in them waits for the device, and no shape depends on values; proven without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.devices import ON_CPU
from tests.graph_safety import cases, known_offences

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module", params=[ON_CPU])
def found() -> list[dict[str, list[str]]]:
    """What `tests.graph_safety` objects to, in the ops and in what is known to offend."""
    command = [sys.executable, "-W", "ignore", "-m", "tests.graph_safety"]  # numpy warns of the infinities that the interpreter meets
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, check=True, capture_output=True, text=True, cwd=ROOT)
    answer: list[dict[str, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.parametrize("name", cases())
def test_no_operation_waits_for_the_device(name: str, found: list[dict[str, list[str]]]) -> None:
    assert found[0][name] == []


@pytest.mark.parametrize("name", known_offences())
def test_what_waits_is_found(name: str, found: list[dict[str, list[str]]]) -> None:
    assert found[1][name]
