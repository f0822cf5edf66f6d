"""A teacher as a process of its own beside a run: started, waited for until it is healthy, and never left behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bbopd.config import ServeConfig
from bbopd.errors import TeacherError
from bbopd.rpc.channel import open_channel

__all__ = ["TeacherProcess"]

_POLL = 0.1  # seconds
_SHOWN_LINES = 12


class TeacherProcess:
    """A running ``bbopd serve``; made by `start`. It ends with `stop`, and by itself where its parent is gone."""

    def __init__(self, process: subprocess.Popen[bytes], log_path: Path, target: str) -> None:
        self.target = target
        self.log_path = log_path
        self._process = process

    @classmethod
    async def start(cls, config: ServeConfig, log_path: str | os.PathLike[str], timeout: float) -> TeacherProcess:
        """Start a teacher on a free port of this machine and wait until it answers.

        Parameters
        ----------
        config : what to serve; its host, port, tls and tokens are not used: this is loopback.
        log_path : takes all that the process prints; beside it lie its configuration and its address.
        timeout : seconds it may take to load and become healthy.

        Raises
        ------
        TeacherError : its files cannot be written; or it died or was not ready in time, and the message ends with the last lines
            of its log.
        """
        log = Path(log_path).absolute()
        settings, ready_file = log.with_suffix(".yaml"), log.with_suffix(".address")
        shown = json.dumps(
            config.model_copy(update={"host": "127.0.0.1", "port": 0, "tls": None, "token_file": None, "token_env": None}).model_dump(
                mode="json"
            ),
            indent=1,
        )
        command = [sys.executable, "-m", "bbopd", "serve", str(settings), "--ready-file", str(ready_file), "--parent-pid", str(os.getpid())]
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            settings.write_text(shown)
            ready_file.unlink(missing_ok=True)
            with log.open("wb") as output:
                # a group of its own: Ctrl-C in the terminal reaches the run alone, which stops its teacher after saving
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, process_group=0)
        except OSError as error:
            raise TeacherError(
                f"cannot start the teacher {config.model}: {error.filename or settings}: {error.strerror}; free some space there, or set "
                "output to a folder that can be written"
            ) from error
        started = cls(process, log, "")
        try:
            await started._wait_until_healthy(ready_file, config.model, timeout)
        except BaseException:
            started.stop(grace=1.0)
            raise
        return started

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def last_lines(self) -> str:
        """The end of its log, for a message."""
        try:
            lines = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError:
            return ""
        return "\n".join(lines[-_SHOWN_LINES:])

    def stop(self, grace: float = 10.0) -> None:
        """End it: SIGTERM, then after ``grace`` seconds SIGKILL to its whole group. Harmless where it has ended."""
        if self.alive:
            self._process.terminate()
            try:
                self._process.wait(grace)
            except subprocess.TimeoutExpired:
                os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()

    async def _wait_until_healthy(self, ready_file: Path, model: str, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while not (self.target and await _is_serving(self.target)):
            if not self.alive:
                raise TeacherError(self._explain(f"the teacher process for {model} ended with exit code {self._process.returncode}"))
            if time.monotonic() > deadline:
                raise TeacherError(self._explain(f"the teacher {model} was not ready after {timeout:g} s (teacher.start_timeout)"))
            await asyncio.sleep(_POLL)
            if not self.target and ready_file.exists():
                self.target = ready_file.read_text().strip()

    def _explain(self, what: str) -> str:
        return f"{what}; the end of {self.log_path}:\n{self.last_lines() or '(it printed nothing)'}"


async def _is_serving(target: str) -> bool:
    async with open_channel(target) as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=2.0)
        except grpc.aio.AioRpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
