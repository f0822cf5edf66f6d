"""The ranks of a run on their hosts: started as ``torchrun`` would, watched, and ended together."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from bbopd.cluster.host import Launch, Place
from bbopd.cluster.hosts import HostLostError, Hosts, RemoteHost
from bbopd.errors import BudgetSpentError, CheckpointError, ClusterError, ConfigError, TrainingError

LOST = -1
"""The exit status of a rank whose host is gone."""
INTERRUPTED = 130
_FINAL = {error.exit_code for error in (ConfigError, TrainingError, CheckpointError, BudgetSpentError)}
_LINGER_S = 3.0
_POLL_S = 0.2


class Verdict(Enum):
    """What is to be done once ranks have ended."""

    FINISHED = "finished"
    STOPPED = "stopped"
    FAILED = "failed"
    AGAIN = "again"


def judge(statuses: Sequence[int], *, has_trained: bool) -> Verdict:
    """What follows from the exit statuses of all ranks.

    A rank that was killed or lost, or that has lost another, is started again; an error with a name is final where the next attempt must
    meet it too: of the configuration, the budget, the disk, or any at all in an attempt that ``has_trained`` nothing.
    """
    if statuses[0] == 0:
        return Verdict.FINISHED
    if INTERRUPTED in statuses:
        return Verdict.STOPPED
    named = {status for status in statuses if 0 < status < 128} - {8}  # those that have lost another rank
    if named & _FINAL or (named and not has_trained):
        return Verdict.FAILED
    return Verdict.AGAIN


def describe(statuses: Sequence[int]) -> str:
    """Which ranks have ended of themselves, and how."""
    causes = [(rank, status) for rank, status in enumerate(statuses) if status not in (0, 8)] or [(0, statuses[0])]
    return ", ".join(f"rank {rank} {_said(status)}" for rank, status in causes)


@dataclass(frozen=True, slots=True)
class RanksHeard:
    """The ranks now: what the first has printed, and the exit status of each; None while it runs."""

    text: str
    statuses: tuple[int | None, ...]


class RankGroup:
    """All ranks of a run, one attempt after another. ``launch`` is what each runs, for a log of its number."""

    def __init__(self, hosts: Hosts, launch: Launch) -> None:
        self._hosts, self._launch = hosts, launch
        self._members = [hosts.host("rank", number) for number in range(hosts.count("rank"))]  # as the cluster holds room for them
        self._ranks: list[RemoteHost] = []

    def start(self, seconds: float) -> Sequence[str]:
        """Start every rank, on other hosts where those of before are lost; returns the addresses of their nodes, in the order of ranks.

        Raises `ClusterError` where the cluster gives no hosts within ``seconds``, or a node not its part.
        """
        placed = [(self._place(number, seconds), self._members[number]) for number in range(len(self._members))]
        placed.sort(key=lambda one: (one[0].address, one[0].node))
        self._ranks = [member for _, member in placed]
        places = [place for place, _ in placed]
        try:
            port = self._ranks[0].call("free_port")
            for rank, (member, environment) in enumerate(zip(self._ranks, environments(places, port), strict=True)):
                own = {**self._launch.environment, **environment}
                member.call("start", replace(self._launch, log=self._launch.log.format(rank=rank), environment=own))
        except (HostLostError, OSError) as error:
            raise ClusterError(f"the ranks cannot be started: {error}; the same command tries again") from error
        return [place.address for place in places]

    def hear(self) -> RanksHeard:
        calls = [member.begin("hear") for member in self._ranks]
        texts, statuses = [], []
        for member, call in zip(self._ranks, calls, strict=True):
            try:
                heard = member.end(call)
                texts.append(heard.text)
                statuses.append(heard.status)
            except HostLostError:
                texts.append("")
                statuses.append(LOST)
        return RanksHeard(texts[0], tuple(statuses))

    def terminate(self) -> None:
        """Ask the first rank, and by it the others, to save and end."""
        self._each(self._ranks[:1], "terminate")

    def end(self, show: Callable[[str], None]) -> list[int]:
        """End all that still run, once they had a moment to say why; returns the statuses that they ended with by themselves."""
        deadline = time.monotonic() + _LINGER_S
        while None in (heard := self.hear()).statuses and time.monotonic() < deadline:
            show(heard.text)
            time.sleep(_POLL_S)
        show(heard.text)
        self._each(self._ranks, "kill")
        return [8 if status is None else status for status in heard.statuses]

    def _place(self, number: int, seconds: float) -> Place:
        try:
            place: Place = self._members[number].call("place", seconds=seconds)
            return place
        except HostLostError:
            self._members[number].forget()
            self._members[number] = self._hosts.host("rank", number)
        try:
            place = self._members[number].call("place", seconds=seconds)
            return place
        except HostLostError as error:
            raise ClusterError(
                f"the cluster has no room for {len(self._members)} ranks any more, within {seconds:g} s: the same command goes on from the "
                "last checkpoint when nodes are back, or with fewer cluster.ranks"
            ) from error

    @staticmethod
    def _each(members: Sequence[RemoteHost], method: str) -> None:
        for member, call in [(member, member.begin(method)) for member in members]:
            try:
                member.end(call)
            except HostLostError:
                continue


def environments(places: Sequence[Place], port: int) -> list[dict[str, str]]:
    """What ``torchrun`` would set for ranks at ``places``, those of a node beside each other.

    All ranks of a node see all of the GPUs that any of them was given, as nccl wants it, and take the one of their number.
    """
    seen: Counter[str] = Counter()
    size = Counter(place.node for place in places)
    gpus = {node: [gpu for place in places if place.node == node for gpu in place.gpus] for node in size}
    found = []
    for rank, place in enumerate(places):
        found.append(
            {
                "RANK": str(rank),
                "WORLD_SIZE": str(len(places)),
                "LOCAL_RANK": str(seen[place.node]),
                "LOCAL_WORLD_SIZE": str(size[place.node]),
                "MASTER_ADDR": places[0].address,
                "MASTER_PORT": str(port),
                **({"CUDA_VISIBLE_DEVICES": ",".join(gpus[place.node])} if gpus[place.node] else {}),
            }
        )
        seen[place.node] += 1
    return found


def _said(status: int) -> str:
    if status == LOST:
        return "is lost with its node"
    if status > 128:
        number = status - 128
        return f"was ended by signal {signal.Signals(number).name if number in set(signal.Signals) else number}"
    return f"ended with exit status {status}"
