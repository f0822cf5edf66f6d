"""One line a contestant and case, as CSV: all that tables and plots are made from."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.cases import Case
from benchmarks.contest import Contestant, Entry


@dataclass(frozen=True, slots=True)
class Record:
    """None (an empty field) where something was not measured; ``skipped`` says why a contestant did not run."""

    model: str
    objective: str
    N: int
    D: int
    V: int
    dtype: str
    contestant: str
    rounds: int
    median_ms: float | None
    fastest_ms: float | None
    ratio: float | None
    memory_mib: float | None
    error: float | None
    near_error: float | None
    note: str
    skipped: str
    processor: str
    instruction_sets: str
    cores: str
    threads: str
    torch: str
    python: str
    date: str
    command: str
    machine: str
    driver: str = ""  # of a GPU, as are the next two
    triton: str = ""
    row_gigabytes_per_second: float | None = None

    @property
    def case(self) -> tuple[str, str, int, int, int, str]:
        """What was measured, whoever took part."""
        return self.objective, self.model, self.N, self.D, self.V, self.dtype


def make_record(
    case: Case,
    entry: Entry,
    floor_seconds: float | None,
    memory_mib: float | None,
    error: float | None,
    near_error: float | None,
    machine: dict[str, str],
    row_gigabytes_per_second: float | None = None,
) -> Record:
    contestant: Contestant = entry.contestant
    median = entry.median
    return Record(
        model=case.model,
        objective=case.objective,
        N=case.N,
        D=case.D,
        V=case.V,
        dtype=case.dtype,
        contestant=contestant.name,
        rounds=len(entry.seconds),
        median_ms=None if median is None else 1e3 * median,
        fastest_ms=1e3 * min(entry.seconds) if entry.seconds else None,
        ratio=None if median is None or floor_seconds is None else median / floor_seconds,
        memory_mib=memory_mib,
        error=error,
        near_error=near_error,
        note=contestant.note,
        skipped=entry.skipped,
        row_gigabytes_per_second=row_gigabytes_per_second,
        **machine,
    )


def write(path: Path, records: Iterable[Record]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Record)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def read(path: Path) -> list[Record]:
    with path.open(newline="") as file:
        return [Record(**{name: _parsed(name, value) for name, value in row.items()}) for row in csv.DictReader(file)]


def _parsed(name: str, value: str) -> Any:
    if name in ("N", "D", "V", "rounds"):
        return int(value)
    if name in ("median_ms", "fastest_ms", "ratio", "memory_mib", "error", "near_error", "row_gigabytes_per_second"):
        return float(value) if value else None
    return value
