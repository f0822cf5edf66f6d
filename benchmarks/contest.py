"""Contestants, and their times: every round runs each of them once, in turn, so that noise of the machine falls on all alike."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks import clock
from benchmarks.cases import Case

ROOT = Path(__file__).resolve().parent.parent
Step = Callable[[], Tensor | None]


class Resettable(Protocol):
    """What contestants share: tensors whose gradients are dropped after each step."""

    @property
    def leaves(self) -> tuple[Tensor, ...]: ...

    def drop_gradients(self) -> None: ...


class DeviceLostError(RuntimeError):
    """A contestant's error left the device unusable to this process; its name and the error."""


def never(case: Case) -> str:
    """Nothing stands in the way."""
    return ""


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do a case's task.

    Attributes
    ----------
    name
        As it stands in the table.
    prepare
        From the inputs to a step: forward and backward, which leaves the gradients in ``.grad`` and returns the loss (None where the
        contestant has none).
    missing
        Why this machine cannot run it, or an empty string.
    bytes_per_logit
        Upper estimate of what it needs for each of the N * V logits; it is skipped where less memory is free.
    is_compiled
        Its first call of a shape compiles: memory is then measured from the second.
    has_loss
        Whether its loss is the one of the case; False for another objective.
    is_peer
        Another library's: if it fails, the table says so and the others go on.
    takes_head
        It is given the teacher's hidden states and head in place of what the case's teacher sends.
    note
        What the table says of it.
    """

    name: str
    prepare: Callable[[Any], Step]
    missing: Callable[[Case], str] = never
    bytes_per_logit: float = 0.0
    is_compiled: bool = False
    has_loss: bool = True
    is_peer: bool = False
    takes_head: bool = False
    note: str = ""


@dataclass(slots=True)
class Entry:
    """A contestant in one contest: ready to run, or ``skipped`` for a reason."""

    contestant: Contestant
    step: Step | None = None
    skipped: str = ""
    may_fail: bool = False
    has_failed: bool = False  # by an error that is not want of memory
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None


def enter(
    contestants: Iterable[Contestant],
    inputs: Resettable,
    case: Case,
    *,
    any_may_fail: bool = False,
    entering: Callable[[str], None] = lambda name: None,
) -> list[Entry]:
    """Prepare and warm up each contestant; one that cannot run is kept, with the reason. ``entering`` is told of each."""
    entries = []
    torch.compiler.reset()  # else a few cases on, the limit of recompilations would turn compiled peers into eager ones
    for contestant in contestants:
        entry = Entry(contestant, skipped=contestant.missing(case) or _lacks_memory(contestant, case))
        entry.may_fail = contestant.is_peer or any_may_fail
        if not entry.skipped:
            entering(contestant.name)
            with failing_alone(entry, inputs):
                entry.step = contestant.prepare(inputs)
                entry.step()
                clock.wait(case.device)
            inputs.drop_gradients()
        entries.append(entry)
    run_round(entries, inputs, 0)  # preparing one may have made another's compiled code stale
    for entry in entries:
        entry.seconds.clear()
    return entries


def run_round(entries: list[Entry], inputs: Resettable, number: int) -> None:
    """One step of each contestant, timed; the order turns by one place every round."""
    able = [entry for entry in entries if entry.step is not None]
    for entry in able[number % len(able) :] + able[: number % len(able)] if able else []:
        with failing_alone(entry, inputs):
            entry.seconds.append(clock.seconds_of(partial(_step_and_drop, entry.step, inputs), inputs.leaves[0].device.type))


def _step_and_drop(step: Step, inputs: Resettable) -> None:
    step()
    inputs.drop_gradients()


@contextmanager
def failing_alone(entry: Entry, inputs: Resettable) -> Iterator[None]:
    """An error puts the contestant out of the contest, with the reason, where it may fail."""
    try:
        yield
    except Exception as error:  # what another library may raise is not ours to list
        if not entry.may_fail:
            raise
        first_line, _, _ = str(error).strip().partition("\n")
        entry.step, entry.skipped = None, f"{type(error).__name__}: {first_line}"
        entry.has_failed = not isinstance(error, torch.OutOfMemoryError)
        entry.seconds.clear()
    if entry.skipped:  # outside the handler, which holds the frames and their tensors
        inputs.drop_gradients()
        try:
            clock.recover(inputs.leaves[0].device.type)
        except RuntimeError as error:
            raise DeviceLostError(entry.contestant.name, entry.skipped) from error


def free_bytes(device: str = "cpu") -> int | None:
    """Memory that new allocations can have without swapping, where the system tells."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _lacks_memory(contestant: Contestant, case: Case) -> str:
    needed, free = contestant.bytes_per_logit * case.N * case.V, free_bytes(case.device)
    if free is None or needed <= free:
        return ""
    return f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"


def peak_megabytes(suite: str, case: Case, name: str) -> float | None:
    """Peak memory of one step beyond inputs and gradients, in MiB, from a fresh process; None where the system does not tell."""
    request = json.dumps({"suite": suite, "case": asdict(case), "contestant": name, "threads": torch.get_num_threads()})
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "benchmarks.peak_memory", request]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process that measures the memory of {name!r} failed:\n{done.stderr[-2000:]}")
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    return None if answer is None else answer / 2**20
