"""What the processes of a run need of the cluster, and whether it has that: said at once, where Ray would wait for ever."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from bbopd.config import NeedsConfig, RunConfig
from bbopd.errors import ConfigError

_ELSEWHERE = "grpc://localhost:1"  # anywhere but beside a rank


@dataclass(frozen=True, slots=True)
class Need:
    """``count`` processes called ``name``, by ``setting``; each is given ``cpus`` and ``gpus``."""

    name: str
    setting: str
    count: int
    cpus: float
    gpus: int

    @property
    def bundle(self) -> dict[str, float]:
        """One of them, as Ray counts."""
        return {"CPU": self.cpus, **({"GPU": float(self.gpus)} if self.gpus else {})}


@dataclass(frozen=True, slots=True)
class Node:
    """What one node has in all, free or not."""

    address: str
    cpus: float
    gpus: float


def needs_of(config: RunConfig, nodes: Sequence[Node]) -> list[Need]:
    """The ranks first, then servers of the teacher, then the engines to begin with."""
    cluster = config.cluster
    has_gpus = any(node.gpus for node in nodes)

    def need(name: str, setting: str, count: int, each: NeedsConfig) -> Need:
        return Need(name, f"cluster.{setting}", count, each.cpus, int(has_gpus) if each.gpus is None else each.gpus)

    teachers = cluster.teachers if config.teacher.serve is not None else 0
    return [
        need("rank", "ranks", cluster.ranks, cluster.rank_needs),
        need("teacher", "teachers", teachers, cluster.teacher_needs),
        need("engine", "engines", cluster.engines[0], cluster.engine_needs),
    ]


def nodes_of(told: Iterable[dict[str, Any]]) -> list[Node]:
    """The living ones of ``ray.nodes()``."""
    return [
        Node(node["NodeManagerAddress"], node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in told
        if node["Alive"]
    ]


def missing_of(needs: Sequence[Need], free: Mapping[str, float]) -> str:
    """What of ``needs`` is not among what is ``free``, as Ray counts it; empty where all is."""
    wanted = {kind: sum(need.count * need.bundle.get(kind, 0.0) for need in needs) for kind in ("CPU", "GPU")}
    short = {kind: count for kind, count in wanted.items() if count > free.get(kind, 0.0)}
    return " and ".join(f"{count:g} {kind}s, of which {free.get(kind, 0.0):g} are free" for kind, count in short.items())


@dataclass(slots=True)
class Placed:
    """What one node would hold, by name, and what is then left of it."""

    node: Node
    cpus: float
    gpus: float
    pieces: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        held = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in self.pieces.items()) or "nothing"
        return f"{self.node.address} ({_said(self.node.cpus, self.node.gpus)}): {held}; {_said(self.cpus, self.gpus)} free"


def check_room(needs: Sequence[Need], nodes: Sequence[Node], wait: float) -> list[Placed]:
    """Where ``needs`` would find room on ``nodes``, all of them empty; Ray, asked for the same, may choose other nodes.

    Raises `ConfigError` where they would not, with what is there.
    """
    placed = [Placed(node, node.cpus, node.gpus) for node in nodes]
    for need in sorted(needs, key=lambda need: (-need.gpus, -need.cpus)):
        for _ in range(need.count):
            place = next((one for one in placed if one.gpus >= need.gpus and one.cpus >= need.cpus), None)
            if place is None:
                raise ConfigError(_no_room(need, needs, nodes, wait))
            place.gpus -= need.gpus
            place.cpus -= need.cpus
            place.pieces[need.name] += 1
    return placed


def with_more(needs: Sequence[Need], name: str, count: int) -> list[Need]:
    """``needs``, with ``count`` of ``name``."""
    return [replace(need, count=count) if need.name == name else need for need in needs]


def most_engines(needs: Sequence[Need], nodes: Sequence[Node], most: int) -> int:
    """How many engines there is room for beside all else, up to ``most``; those of ``needs`` fit."""
    count = next(need.count for need in needs if need.name == "engine")
    while count < most:
        try:
            check_room(with_more(needs, "engine", count + 1), nodes, 0.0)
        except ConfigError:
            break
        count += 1
    return count


@dataclass(frozen=True, slots=True)
class Placement:
    """Where processes would be; made by `of`. ``problem``: why they do not fit, or nothing; ``engines``: how many have room."""

    placed: tuple[Placed, ...]
    problem: str
    engines: int
    most: int

    @classmethod
    def of(cls, config: RunConfig, nodes: Sequence[Node]) -> Placement:
        needs, most = needs_of(config, nodes), config.cluster.engines[1]
        try:
            placed = check_room(needs, nodes, 0.0)
        except ConfigError as error:
            return cls((), str(error), 0, most)
        return cls(tuple(placed), "", most_engines(needs, nodes, most), most)

    def lines(self) -> Iterator[str]:
        """For a person to read, as those of a plan."""
        if self.problem:
            yield f"cluster   no: {self.problem}"
        for number, one in enumerate(self.placed):
            yield f"{'' if number else 'cluster':10s}{one}"
        if self.placed and self.engines < self.most:
            yield f"          room for {self.engines} engines, of the {self.most} that cluster.engines allows"

    def to_json(self) -> dict[str, Any]:
        nodes = [{"node": one.node.address, "holds": dict(one.pieces), "free": {"cpus": one.cpus, "gpus": one.gpus}} for one in self.placed]
        return {"fits": not self.problem, "problem": self.problem, "nodes": nodes, "engines": {"room": self.engines, "most": self.most}}


def as_one_rank(config: RunConfig) -> RunConfig:
    """``config`` as far as what a rank holds is concerned: teacher and engines of a cluster have places of their own."""
    teacher, rollouts = config.teacher, config.rollouts
    if teacher.serve is not None:
        teacher = teacher.model_copy(update={"serve": None, "target": [_ELSEWHERE]})
    if config.cluster.engines[0]:
        rollouts = rollouts.model_copy(update={"target": _ELSEWHERE})
    cluster = config.cluster.model_copy(update={"engines": (0, 0), "scale": None})
    return config.model_copy(update={"teacher": teacher, "rollouts": rollouts, "cluster": cluster})


def _no_room(failed: Need, needs: Sequence[Need], nodes: Sequence[Node], wait: float) -> str:
    asked = ", ".join(f"{need.setting} {need.count} ({_said(need.cpus, need.gpus)} each)" for need in needs if need.count)
    there = "; ".join(f"{node.address} has {_said(node.cpus, node.gpus)}" for node in nodes) or "no node at all"
    waited = f" after {wait:g} s (cluster.wait)" if wait else ""
    return (
        f"the cluster has no room for the run{waited}: it needs {asked}, and {there}. Lower {failed.setting} or "
        f"cluster.{failed.name}_needs, add nodes, or set cluster.wait to the seconds that they may take to join"
    )


def _said(cpus: float, gpus: float) -> str:
    return f"{cpus:g} CPUs and {gpus:g} GPUs"
