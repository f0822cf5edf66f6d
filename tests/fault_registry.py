"""Which fault each test brings about, and what becomes of it: the rows of the table in docs/teachers.md.

``python -m tests.fault_registry`` writes the table into the page; ``test_faults_docs.py`` holds the page to it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

BEGIN, END = "<!-- faults the client survives: written by `python -m tests.fault_registry` -->", "<!-- end -->"
SECONDS = 240  # that any of these tests may take

Test = TypeVar("Test", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    outcome: str
    test: str


FAULTS: list[Fault] = []
_OTHERS = [
    "test_budget",
    "test_cache",
    "test_security",
    "test_server_limits",
    "test_renewal",
    "test_request_rate",
    "test_wire_batches",
]  # faults of files and of money, and what clients may do to a server


def fault(name: str, outcome: str) -> Callable[[Test], Test]:
    """Say of a test which fault it brings about and what becomes of it; give it a time limit, for none of them may hang."""

    def register(test: Test) -> Test:
        FAULTS.append(Fault(name, outcome, f"{test.__module__.removeprefix('tests.')}.py::{test.__name__}"))
        return pytest.mark.timeout(SECONDS)(test)

    return register


def table() -> str:
    """The table of all faults, in the order of the modules and of their tests."""
    for name in [path.stem for path in Path(__file__).parent.glob("test_faults_*.py")] + _OTHERS:
        importlib.import_module(f"tests.{name}")
    in_order = sorted(FAULTS, key=lambda entry: entry.test.partition("::")[0])  # of the modules, whichever was imported first
    rows = dict.fromkeys((entry.name, entry.outcome, entry.test) for entry in in_order)
    lines = ["| fault | what becomes of it | test |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {outcome} | `{test}` |" for name, outcome, test in rows)])


def write(page: Path) -> None:
    """Put the table into ``page``, between its two marks."""
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    page.write_text(f"{before}{BEGIN}\n\n{table()}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


if __name__ == "__main__":
    from tests import fault_registry  # the module that the tests register with, which __main__ is not

    fault_registry.write(Path(__file__).parents[1] / "docs" / "teachers.md")
