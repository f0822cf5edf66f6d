"""A process between a Ray worker and a process of the run, so that this one never outlives what has started it, and yet may save.

A worker that is killed can end nothing any more; what it has started would go on, hold its GPU, and write into the run's folder. One
that ends, since its driver has, is as bad: it kills its children at once (Ray's ``kill_child_processes_on_worker_exit``). So there are two
processes here: the child of the worker, which only hands on signals, and its child, which outlives it for as long as it takes to save.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress

_POLL_S = 0.2
_PR_SET_PDEATHSIG = 1
_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def main(argv: list[str]) -> int:
    """Run ``argv[2:]`` as a process group; returns its exit status, or 128 and the number of the signal that ended it.

    Once ``argv[0]``, the parent, or this process is gone, it has ``argv[1]`` seconds to end after SIGTERM. A SIGTERM is handed on; SIGUSR1
    ends the whole group at once.
    """
    parent, grace = int(argv[0]), float(argv[1])
    ours = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)  # one that comes while the process is started is handed on too
    ward = os.fork()
    if not ward:
        return _watch(ours, grace, argv[2:])
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: os.kill(ward, number))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    while not (ended := os.waitpid(ward, os.WNOHANG))[0]:
        if os.getppid() != parent:
            return 1  # the ward notices
        time.sleep(_POLL_S)
    status = os.waitstatus_to_exitcode(ended[1])
    return status if status >= 0 else 128 - status


def _watch(parent: int, grace: float, command: list[str]) -> int:
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, 0)  # Ray's workers have given way to all else (RAY_worker_niceness), as training must not
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, process_group=0, preexec_fn=_set_up_child)
    signal.signal(signal.SIGTERM, lambda number, frame: process.terminate())
    signal.signal(signal.SIGUSR1, lambda number, frame: _kill_group(process.pid))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    deadline = None
    while True:
        try:
            status = process.wait(_POLL_S)
            break
        except subprocess.TimeoutExpired:
            if deadline is None and os.getppid() != parent:
                process.terminate()
                deadline = time.monotonic() + grace
            elif deadline is not None and time.monotonic() > deadline:
                _kill_group(process.pid)
    _kill_group(process.pid)  # what it has left behind
    return status if status >= 0 else 128 - status


def _kill_group(leader: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def _set_up_child() -> None:
    """In the child, before it becomes another program: SIGKILL where the ward, which has one thread, is killed itself."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
