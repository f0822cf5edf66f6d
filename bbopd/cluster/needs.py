"""What the processes of a run need of the cluster, and whether it has that: said at once, where Ray would wait for ever."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bbopd.config import NeedsConfig, RunConfig
from bbopd.errors import ConfigError


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


def check_room(needs: Sequence[Need], nodes: Sequence[Node], wait: float) -> None:
    """Raises `ConfigError` where ``nodes``, all of them empty, would not hold ``needs``; with what is there."""
    free = [[node.gpus, node.cpus] for node in nodes]
    for need in sorted(needs, key=lambda need: (-need.gpus, -need.cpus)):
        for _ in range(need.count):
            place = next((one for one in free if one[0] >= need.gpus and one[1] >= need.cpus), None)
            if place is None:
                raise ConfigError(_no_room(need, needs, nodes, wait))
            place[0] -= need.gpus
            place[1] -= need.cpus


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
