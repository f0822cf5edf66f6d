"""Fixtures of all tests, and of those that run commands, in whatever file they are."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.cli_runs import WORDS, environment


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """What a test draws without a seed of its own does not depend on which tests ran before it in this process."""
    random.seed(20_261)
    np.random.seed(20_261)
    torch.manual_seed(20_261)


@pytest.fixture
def as_in_a_process_of_its_own(monkeypatch) -> Iterator[None]:
    """The same number of threads as a run in a process has, and no setting of a run left for other tests."""
    monkeypatch.setenv("OMP_NUM_THREADS", environment()["OMP_NUM_THREADS"])
    threads, is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(is_deterministic)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    documents = [" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40)]
    path.write_text("\n\n\n".join(documents))
    return path
