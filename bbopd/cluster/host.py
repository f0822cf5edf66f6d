"""Where a process of the run lives: an actor on a node, which starts it there, says how it is, and ends it.

Runs in Ray's workers. What goes through Ray are names, numbers and text; tensors take their own ways.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from io import BufferedReader

HERE = "{here}"
"""In an argument: the folder that holds `Launch.files`."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an actor is, and the GPUs that it may use there."""

    node: str
    address: str
    gpus: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Launch:
    """A process to start: ``python -m module arguments``, with ``environment`` over the actor's own.

    ``files`` are written beside it, for its eyes alone; ``folder`` is where it runs, if the node has it; ``log`` takes what it prints.
    """

    arguments: tuple[str, ...]
    log: str
    module: str = "bbopd"
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    folder: str = "."
    grace: float = 60.0  # seconds, where the actor is gone


@dataclass(frozen=True, slots=True)
class Heard:
    """A process now: what it has printed since it was last asked, and its exit status; None while it runs."""

    text: str
    status: int | None


class Host:
    """The actor; one process at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._printed: BufferedReader | None = None
        self._here = tempfile.TemporaryDirectory(prefix="bbopd-")

    def place(self) -> Place:
        import ray

        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        return Place(context.get_node_id(), ray.util.get_node_ip_address(), tuple(str(gpu) for gpu in gpus))

    def free_port(self) -> int:
        """A port of this node that nobody has now."""
        with socket.socket() as taken:
            taken.bind(("", 0))
            return int(taken.getsockname()[1])

    def start(self, launch: Launch) -> None:
        """Raises OSError where the log or the process cannot be had."""
        self.kill()
        here = Path(self._here.name)
        for old in here.iterdir():
            old.unlink()
        for name, text in launch.files.items():
            (here / name).touch(mode=0o600)
            (here / name).write_text(text, encoding="utf-8")
        words = [word.replace(HERE, str(here)) for word in launch.arguments]
        ward = [sys.executable, "-m", "bbopd.cluster.ward", str(os.getpid()), str(launch.grace)]
        log = Path(launch.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        if self._printed is not None:
            self._printed.close()
        with log.open("ab") as output:
            self._printed = log.open("rb")
            self._printed.seek(0, os.SEEK_END)
            self._process = subprocess.Popen(
                [*ward, sys.executable, "-m", launch.module, *words],
                cwd=launch.folder if os.path.isdir(launch.folder) else None,  # else where Ray has put the driver's working_dir
                env={**os.environ, **launch.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def read(self, name: str) -> str | None:
        """One of the process's files, which it may have written itself; None where it is not there."""
        try:
            return (Path(self._here.name) / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None

    def hear(self) -> Heard:
        assert self._process is not None, "it has been started"
        assert self._printed is not None, "with its log"
        status = self._process.poll()
        return Heard(self._printed.read().decode(errors="replace"), status)

    def terminate(self) -> None:
        """Ask the process to end. Harmless where it has ended."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """End the process at once, and wait for it. Harmless where it has ended, or none was started."""
        if self._process is None:
            return
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(signal.SIGUSR1)  # the ward ends its group
        self._process.wait()
