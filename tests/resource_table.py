"""docs/kernel_resources.csv: what every kernel takes of a GPU's multiprocessor, as its compiler says."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "docs" / "kernel_resources.csv"
REGISTER_FILE, LARGEST_SHARE = 65536, 2  # of a multiprocessor, that two rows at least be worked on at a time
OTHER_VERSION = 16  # registers by which another compiler's allocation may differ


@dataclass(frozen=True, slots=True)
class Usage:
    """One line: ``shared`` in bytes a block of threads, ``stack`` and ``spilled`` in bytes a thread."""

    kernel: str
    variant: str
    capability: int
    registers: int
    shared: int
    stack: int
    spilled: int
    threads: int
    compiler: str

    def assert_fits(self) -> None:
        """Nothing is spilled, two blocks or more fit on a multiprocessor, and the table knows the numbers."""
        assert (self.stack, self.spilled) == (0, 0)
        assert self.registers * self.threads * LARGEST_SHARE <= REGISTER_FILE
        (known,) = (line for line in read() if (line.variant, line.capability) == (self.variant, self.capability))
        if self.compiler == known.compiler:
            assert self == known
        else:
            assert self.registers <= known.registers + OTHER_VERSION


def read() -> list[Usage]:
    with TABLE.open(newline="") as file:
        types = {one.name: int if one.type == "int" else str for one in fields(Usage)}
        return [Usage(**{name: types[name](value) for name, value in row.items()}) for row in csv.DictReader(file)]


def write(lines: Iterable[Usage]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, [one.name for one in fields(Usage)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(line) for line in lines)
