"""The sample servers of a run, as many as are wanted now; the ranks find them by a file of addresses."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Callable
from pathlib import Path

from bbopd.cluster.hosts import Hosts
from bbopd.cluster.servers import Server
from bbopd.config import RunConfig
from bbopd.errors import ClusterError, ConfigError
from bbopd.pipeline.folder import RunFolder
from bbopd.rpc.run_server import write_whole

FOLDER = "cluster"
"""In the run's folder: what the processes are started with, their logs, and what is wanted of them."""
LOCK = "lock"
_WANTED = "engines.json"
_LEAVE_S = 3.0  # for the ranks to have read that an engine goes

Tell = Callable[[str], None]


def want_engines(run: str | Path, count: int) -> None:
    """Have the driver of the run in folder ``run`` keep ``count`` engines from now on.

    Raises `ConfigError` where no driver is at work there, or ``cluster.engines`` does not allow so many.
    """
    folder = RunFolder(Path(run))
    place = folder.root / FOLDER
    if not (place / LOCK).is_file() or _is_free(place / LOCK):
        raise ConfigError(
            f"{folder.root} is no run that a driver (bbopd distill --ray) is at work on: give the folder of one, its `output`"
        )
    known = _read(place)
    if known is None:
        raise ConfigError(f"{folder.root} has no engines of its own: begin it with cluster.engines, how many at first and at most")
    if not 1 <= count <= known["most"]:
        raise ConfigError(f"{count} engines: cluster.engines of the run allows 1 to {known['most']}")
    _write(place, count, known["most"])


def _read(place: Path) -> dict[str, int] | None:
    try:
        known: dict[str, int] = json.loads((place / _WANTED).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return known


def _write(place: Path, wanted: int, most: int) -> None:
    write_whole(place / _WANTED, json.dumps({"wanted": wanted, "most": most}))


def _is_free(lock: Path) -> bool:
    with lock.open("r") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return False
        return True


class Engines:
    """Kept alive, and their number right, by `look`; ``make`` makes the server of a number."""

    def __init__(self, config: RunConfig, hosts: Hosts, place: Path, make: Callable[[int], Server], tell: Tell) -> None:
        self.targets_file = place / "engines.txt"
        self._first, self._most = config.cluster.engines
        self._hosts, self._place, self._make, self._tell = hosts, place, make, tell
        self._servers = {number: make(number) for number in range(self._first)}
        known = _read(place)
        if self._first:
            _write(place, self._first if known is None else min(known["wanted"], self._most), self._most)
        self._leaving: list[tuple[Server, float]] = []
        self._refused = 0
        self._written: list[str] | None = None

    @property
    def are_there(self) -> bool:
        """Whether one answers, or none is needed."""
        return not self._first or bool(self._written)

    def look(self, restarted: Tell) -> None:
        """Raises `ClusterError` where the last of them has been given up."""
        if not self._first:
            return
        self._resize(self.wanted)
        for number, server in list(self._servers.items()):
            try:
                server.look(restarted)
            except ClusterError as error:
                if len(self._servers) == 1:
                    raise
                self._tell(f"{error}; the others go on")
                self._servers.pop(number).remove()
                self._refused = max(self._refused, len(self._servers) + 1)
        targets = sorted(server.target for server in self._servers.values() if server.target)
        if targets != self._written:
            write_whole(self.targets_file, "".join(f"{target}\n" for target in targets))
            self._written = targets
        for server, until in list(self._leaving):
            if time.monotonic() >= until:
                server.remove()
                self._leaving.remove((server, until))

    @property
    def wanted(self) -> int:
        """How many there are to be now."""
        known = _read(self._place)
        return self._first if known is None else known["wanted"]

    def want(self, count: int) -> None:
        """As `want_engines`, by the driver itself."""
        _write(self._place, count, self._most)

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()

    def _resize(self, wanted: int) -> None:
        while len(self._servers) > max(1, wanted):
            number = max(self._servers)
            server = self._servers.pop(number)
            self._leaving.append((server, time.monotonic() + _LEAVE_S))
            self._tell(f"{server.name} leaves: {len(self._servers)} engines now")
        while len(self._servers) < wanted and wanted != self._refused:
            try:
                self._hosts.check_more("engine", len(self._servers) + 1)
            except ConfigError as error:
                self._tell(f"{len(self._servers)} engines, and no more: {error}")
                self._refused = wanted
                return
            number = next(number for number in range(wanted) if number not in self._servers)
            self._servers[number] = self._make(number)
            self._tell(f"{self._servers[number].name} joins: {len(self._servers)} engines now")
