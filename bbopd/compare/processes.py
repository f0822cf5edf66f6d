"""Runs and measurements as processes of their own: what happens to one happens to no other."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

from bbopd.compare.measure import MARK, MeasureRequest
from bbopd.compare.plan import PlannedRun
from bbopd.errors import BbopdError

INTERRUPTED = 130
_LAST = 2000  # characters of a log that an error repeats


class FailedError(BbopdError):
    """A process ended with an error; what else is to be done can be."""

    exit_code = 4


def distill(run: PlannedRun) -> None:
    """``bbopd distill`` with the run's own file, which stays beside its folder. Raises `FailedError`, or `KeyboardInterrupt`."""
    folder = Path(run.config.output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, log = folder.with_name(f"{run.name}.yaml"), folder.with_name(f"{run.name}.log")
    file.write_text(yaml.safe_dump(run.config.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    _finish(["-m", "bbopd", "distill", str(file), "--plain"], log, f"run {run.name}")


def measure(request: MeasureRequest, log: Path) -> dict[str, Any]:
    """What `bbopd.compare.measure` finds. Raises `FailedError`, or `KeyboardInterrupt`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    answer = _finish(["-m", "bbopd.compare.measure", json.dumps(request.to_json())], log, f"measuring {request.model}")
    lines = [line for line in answer.splitlines() if line.startswith(MARK)]  # libraries may have had the last word
    if not lines:
        raise FailedError(f"measuring {request.model} gave no result; {log} has what it said")
    found: dict[str, Any] = json.loads(lines[-1].removeprefix(MARK))
    log.unlink()
    return found


def _finish(words: Sequence[str], log: Path, what: str) -> str:
    """Run Python with ``words`` to its end; what it printed. A first interrupt is passed on, so that it ends in good order."""
    with log.open("a", encoding="utf-8") as file:
        file.flush()
        start = file.tell()
        process = subprocess.Popen(
            [sys.executable, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        with _interrupts_passed_on(process):
            status = process.wait()
    said = log.read_bytes()[start:].decode(errors="replace")
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status:
        how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
        raise FailedError(f"{what} {how}; {log} ends with:\n{said[-_LAST:].strip()}")
    return said


@contextmanager
def _interrupts_passed_on(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Ctrl-C and SIGTERM reach ``process``, which has a session of its own; this one goes on waiting for it."""
    heard: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        heard.append(number)
        process.send_signal(signal.SIGTERM)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise KeyboardInterrupt
