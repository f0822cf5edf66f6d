"""The programs of a run on a cluster, forked from a process that has imported what they need: each starts within a moment, not ten seconds.

``python -m tests.forked WORDS...`` stands where the process would: it has a `Nursery` fork the program of its first word, hands SIGTERM
on, and ends as that does; where it is killed itself, so is the program.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

FOLDER = "BBOPD_NURSERY"
"""In the environment: where the nursery's socket is, and a file for each program that runs, by its process."""
PROGRAMS = {"distill": "bbopd", "serve": "tests.cluster_teacher", "sample-server": "tests.cluster_engine"}
_PRELOADED = (
    *("bbopd.cli.execute", "bbopd.pipeline.session", "bbopd.pipeline.loop", "bbopd.pipeline.ranked", "bbopd.trainer.ranked"),
    *("bbopd.trainer.checkpoint_shards", "bbopd.rollouts.vllm_fleet", "bbopd.rollouts.vllm_remote", "bbopd.teachers.remote"),
    *("bbopd.report.html", "transformers.models.llama.modeling_llama", "tests.cluster_teacher", "tests.cluster_engine"),
)


@dataclass(frozen=True, slots=True)
class Program:
    """One that runs: its process, what it was started with, and the process that started it (a ward)."""

    pid: int
    words: list[str]
    rank: str
    parent: int


def programs(folder: Path) -> list[Program]:
    """Those that run now."""
    found = []
    for place in (folder / "running").iterdir():
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):  # it has just ended, or is being written
            found.append(Program(**json.loads(place.read_text())))
    return sorted(found, key=lambda program: program.pid)


@contextlib.contextmanager
def nursery(folder: Path) -> Iterator[None]:
    """A process that forks, with its socket in ``folder``; what is started meanwhile finds it by the environment."""
    (folder / "running").mkdir(parents=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "log").open("wb") as log, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
        listener.listen(64)
        command = [sys.executable, "-m", "tests.forked", "--nursery", str(listener.fileno()), str(folder)]
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, pass_fds=(listener.fileno(),))
        os.environ[FOLDER] = str(folder)
        try:
            yield
        finally:
            del os.environ[FOLDER]
            process.kill()
            process.wait()
            for program in programs(folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(program.pid, signal.SIGKILL)


# ------------------------------------------------------------ where the process would be


def stand_in(words: list[str]) -> int:
    """Returns the program's exit status, or ends by the signal that it ended by."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(Path(os.environ[FOLDER]) / "socket"))
        asked = {"words": words, "environment": dict(os.environ), "folder": os.getcwd(), "parent": os.getppid()}
        socket.send_fds(line, [b"."], [1, 2])
        line.sendall(json.dumps(asked).encode() + b"\n")

        def hand_on(number: int, frame: FrameType | None) -> None:
            line.sendall(b"t")

        signal.signal(signal.SIGTERM, hand_on)
        status = int(line.makefile().readline() or -signal.SIGKILL)
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -status)
    return status


# ------------------------------------------------------------ the nursery


class Nursery:
    """Forks what is asked for; a single thread, as a process that forks must be."""

    def __init__(self, listener: socket.socket, folder: Path) -> None:
        self._listener, self._running = listener, folder / "running"
        self._lines: dict[int, socket.socket] = {}  # of each child

    def run(self) -> NoReturn:
        while True:
            ready, _, _ = select.select([self._listener, *self._lines.values()], [], [], 0.02)
            for pid, line in list(self._lines.items()):
                if line in ready:
                    asked = line.recv(1)
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(pid, signal.SIGKILL) if not asked else os.kill(pid, signal.SIGTERM)
                    if not asked:
                        self._end(pid, os.waitpid(pid, 0)[1])
            if self._listener in ready:
                self._begin(self._listener.accept()[0])
            while self._lines and (ended := os.waitpid(-1, os.WNOHANG))[0]:
                self._end(*ended)

    def _begin(self, line: socket.socket) -> None:
        _, outputs, _, _ = socket.recv_fds(line, 1, 2)
        asked = json.loads(line.makefile().readline())
        pid = os.fork()
        if not pid:
            for other in (self._listener, line, *self._lines.values()):
                other.close()
            _become(asked, outputs)
        for output in outputs:
            os.close(output)
        self._lines[pid] = line
        program = {"pid": pid, "words": asked["words"], "rank": asked["environment"].get("RANK", ""), "parent": asked["parent"]}
        (self._running / str(pid)).write_text(json.dumps(program))

    def _end(self, pid: int, ended: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it has left behind
        (self._running / str(pid)).unlink()
        with contextlib.suppress(OSError), self._lines.pop(pid) as line:
            line.sendall(f"{os.waitstatus_to_exitcode(ended)}\n".encode())


def _become(asked: dict[str, Any], outputs: list[int]) -> NoReturn:
    """The program, in the child. Its status is what Python's would be."""
    status = 1
    try:
        os.setpgid(0, 0)
        os.chdir(asked["folder"])
        os.environ.clear()
        os.environ.update(asked["environment"])
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
            os.close(output)
        module = PROGRAMS[asked["words"][0]]
        sys.modules.pop(module, None)  # it has been imported, and is now to be run
        sys.argv = [module, *asked["words"]]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    if sys.argv[1] == "--nursery":
        for name in _PRELOADED:
            importlib.import_module(name)
        Nursery(socket.socket(fileno=int(sys.argv[2])), Path(sys.argv[3])).run()
    sys.exit(stand_in(sys.argv[1:]))
