"""The page says what the tests show."""

from __future__ import annotations

from pathlib import Path

from tests.fault_registry import BEGIN, END, table

PAGE = Path(__file__).parents[1] / "docs" / "teachers.md"


def test_the_table_of_faults_is_that_of_the_tests():
    _, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    assert begin, f"{PAGE.name} has no line {BEGIN}"
    written = rest.partition(END)[0].strip()
    assert written == table(), "run `python -m tests.fault_registry` and look at what has changed"
