"""A Ray cluster of two nodes on this machine: real Ray, each node with a raylet and an object store of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster


@contextmanager
def two_nodes(cpus: int) -> Iterator[Cluster]:
    """Each node counts ``cpus`` processors, whatever the machine has."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"  # read when Ray is imported
    from ray.cluster_utils import Cluster

    size = {"num_cpus": cpus, "object_store_memory": 80 * 2**20}
    head = {"include_dashboard": False, "dashboard_port": None, "_system_config": {"worker_niceness": 0}}
    nodes = Cluster()
    for tries_left in (2, 1, 0):
        try:
            nodes.add_node(**size, **head)
            nodes.add_node(**size)
            break
        except Exception:  # Ray gives a node 30 seconds to start, however busy the machine is
            nodes.shutdown()
            if not tries_left:
                raise
            nodes = Cluster()
    try:
        yield nodes
    finally:
        nodes.shutdown()
