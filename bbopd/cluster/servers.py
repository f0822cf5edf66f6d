"""A server beside the ranks, of the teacher or an engine: started on its host, and started again where it dies, at the same address."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from bbopd.cluster.access import TOKEN_VARIABLE, ClusterAccess
from bbopd.cluster.host import HERE, Launch, Place
from bbopd.cluster.hosts import HostLostError, Hosts, RemoteHost
from bbopd.config import ServeConfig
from bbopd.errors import ClusterError

_LONGEST_BACKOFF_S = 60.0
_READY = "address"


@dataclass(frozen=True, slots=True)
class Served:
    """What a server runs: `Launch.arguments` and files but for its address, which it is told when it is placed."""

    launch: Launch
    access: ClusterAccess

    @classmethod
    def teacher(cls, config: ServeConfig, launch: Launch, access: ClusterAccess) -> Served:
        own = config.model_copy(update={"tls": None, "token_file": None, "token_env": None})
        files = {"teacher.json": own.model_dump_json()}
        return cls(replace(launch, arguments=("serve", f"{HERE}/teacher.json"), files=files), access)

    @classmethod
    def engine(cls, launch: Launch, access: ClusterAccess, *, trust_remote_code: bool) -> Served:
        arguments = ("sample-server", "--set", f"trust_remote_code={str(trust_remote_code).lower()}")
        return cls(replace(launch, arguments=arguments), access)

    def at(self, address: str, port: int) -> Launch:
        access = self.access
        settings = {"tls.certificate": f"{HERE}/server.pem", "tls.key": f"{HERE}/server.key", "token_env": TOKEN_VARIABLE}
        laid_over = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return replace(
            self.launch,
            arguments=(
                *(*self.launch.arguments, "--host", address, "--port", str(port), "--ready-file", f"{HERE}/{_READY}"),
                *laid_over,
            ),
            environment={**self.launch.environment, TOKEN_VARIABLE: access.token},
            files={**self.launch.files, "server.pem": access.certificate, "server.key": access.key},
        )


class Server:
    """Kept alive by `look`, which never waits; ``target`` is empty until it answers for the first time."""

    def __init__(self, hosts: Hosts, name: str, number: int, served: Served, *, max_restarts: int, backoff: float) -> None:
        self.name = f"{name} {number}"
        self.target = ""
        self.restarts = 0
        self._hosts, self._kind, self._number, self._served = hosts, name, number, served
        self._max_restarts, self._backoff = max_restarts, backoff
        self._host: RemoteHost = hosts.host(name, number)
        self._place: Place | None = None
        self._port = 0
        self._is_running = False
        self._again_at = 0.0

    def look(self, restarted: Callable[[str], None]) -> None:
        """See how it is, and do what is due; ``restarted`` hears of each restart.

        Raises `ClusterError` where it has died more than ``max_restarts`` times.
        """
        try:
            if time.monotonic() < self._again_at:
                return
            if self._place is None:
                if not self._host.is_placed():
                    return
                self._place = self._host.call("place")
            if not self._is_running:
                self._port = self._port if self.target else self._host.call("free_port")  # known once it has answered there
                self._host.call("start", self._served.at(self._place.address, self._port))
                self._is_running = True
            status = self._host.call("hear").status
            if status is not None:
                self._plan_restart(f"ended with exit status {status}", restarted)
            elif not self.target:
                self.target = (self._host.call("read", _READY) or "").strip()
        except HostLostError:
            self._host.forget()
            self._host = self._hosts.host(self._kind, self._number)
            self._place, self.target = None, ""
            self._plan_restart("is lost with its node", restarted)

    def stop(self) -> None:
        """Ask it to end; what it has not ended itself goes with its host."""
        try:
            self._host.call("terminate")
        except HostLostError:
            return

    def remove(self) -> None:
        self._host.forget()

    def _plan_restart(self, what: str, restarted: Callable[[str], None]) -> None:
        self._is_running = False
        if self.restarts >= self._max_restarts:
            raise ClusterError(
                f"{self.name} {what}, and has been started again {self.restarts} times (cluster.max_restarts): see "
                f"{self._served.launch.log}; the same command goes on from the last checkpoint"
            )
        delay = backoff_seconds(self._backoff, self.restarts)
        self.restarts += 1
        self._again_at = time.monotonic() + delay
        restarted(f"{self.name} {what}: started again in {delay:g} s ({self.restarts} of {self._max_restarts})")


def backoff_seconds(first: float, restarts: int) -> float:
    """Seconds to wait before the next restart after so many of them."""
    return min(_LONGEST_BACKOFF_S, first * 2.0 ** min(restarts, 10))
