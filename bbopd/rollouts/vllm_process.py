"""The engine's process: started with its own environment, spoken to in lines of JSON over a socket, and never left behind.

A process of its own, because vLLM on a CPU needs libraries preloaded before Python starts, binds its threads to cores, and may die
(of memory, of a signal) without taking the trainer and what it has not yet saved along. Both ends of the wire are this library's, so
nothing listens on a port and nothing is pickled.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from bbopd.errors import EngineError

_LONGEST_LINE = 256 * 2**20  # bytes; an answer takes about 30 a token
_SHOWN_LINES = 12


class EngineProcess:
    """A running `vllm_worker`; made by `start`. It ends with `stop`, and by itself where its parent is gone."""

    def __init__(
        self, process: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter, log_path: Path
    ) -> None:
        self.log_path = log_path
        self._process = process
        self._reader, self._writer = reader, writer

    @classmethod
    async def start(
        cls,
        environment: Mapping[str, str],
        log_path: str | os.PathLike[str],
        *,
        shared_files: Sequence[int] = (),
        module: str = "bbopd.rollouts.vllm_worker",
    ) -> EngineProcess:
        """Start the process and return at once.

        Parameters
        ----------
        environment : all of it.
        log_path : takes all that the process prints.
        shared_files : descriptors that it shall have too, under the same numbers.
        module : what it runs.

        Raises
        ------
        EngineError : the log cannot be written, or no process can be started.
        """
        log = Path(log_path).absolute()
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", module, str(theirs.fileno())]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command,
                    env=dict(environment),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs.fileno(), *shared_files),
                    process_group=0,  # Ctrl-C in the terminal reaches the run alone, which stops its engine after saving
                )
        except OSError as error:
            ours.close()
            raise EngineError(f"cannot start vLLM's process: {error.filename or log}: {error.strerror}") from error
        finally:
            theirs.close()
        try:
            reader, writer = await asyncio.open_unix_connection(sock=ours, limit=_LONGEST_LINE)
        except BaseException:  # nobody wants it any more
            ours.close()
            process.kill()
            process.wait()
            raise
        return cls(process, reader, writer, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message; a process that has ended takes it in silence, and `receive` says so."""
        if not self._writer.is_closing():
            self._writer.write(json.dumps(message, separators=(",", ":")).encode() + b"\n")

    async def carry(self, memory: Tensor) -> None:
        """Nothing to do: the process sees the memory that was written."""

    async def receive(self) -> dict[str, Any]:
        """The next message. Raises `EngineError` where the process has ended."""
        try:
            line = await self._reader.readline()
        except OSError:
            line = b""
        if line.endswith(b"\n"):
            message: dict[str, Any] = json.loads(line)
            return message
        with suppress(subprocess.TimeoutExpired):  # its end of the socket closes a moment before it is gone
            await asyncio.to_thread(self._process.wait, 10.0)
        raise EngineError(self.explain(f"vLLM's process has ended ({_describe_exit(self._process.poll())})"))

    def explain(self, what: str) -> str:
        """``what``, with the last lines of the process's log."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            lines = []
        return f"{what}; the end of {self.log_path}:\n" + ("\n".join(lines[-_SHOWN_LINES:]) or "(it printed nothing)")

    def kill(self) -> None:
        """End it and its group at once, without waiting. Harmless where it has ended."""
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """End it, close the wire, and wait for it. Where the caller's wait is cut off, it is waited for all the same."""
        self.kill()
        self._writer.close()
        await asyncio.shield(asyncio.get_running_loop().run_in_executor(None, self._process.wait))
        with suppress(OSError):
            await self._writer.wait_closed()


def _describe_exit(code: int | None) -> str:
    if code is None:
        return "it closed its end of the wire"
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
    return f"signal {name}" + (": the system may have run out of memory" if name == "SIGKILL" else "")
