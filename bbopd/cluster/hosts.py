"""The hosts of a run on a Ray cluster: the connection, the resources that are held for it, and calls to actors that may be lost."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bbopd.cluster.host import Host
from bbopd.cluster.needs import Need, Placed, check_room, missing_of, needs_of, nodes_of, with_more
from bbopd.config import RunConfig
from bbopd.errors import ClusterError, ConfigError
from bbopd.extras import need

_STORE_BYTES = 100 * 2**20  # of a local Ray's objects, of which there are hardly any
_CALL_S = 60.0  # an actor that answers no more than this is lost
_PLACED_S = 60.0  # beside cluster.wait, for others to give back what they hold
_POLL_S = 1.0
LOCAL = "local"
"""The address that starts a Ray of the run's own."""


class HostLostError(Exception):
    """An actor, or its node, is gone."""


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray at ``address``, or one started here and ended again. Raises `ConfigError` where there is none."""
    if address.startswith("ray://"):
        raise ConfigError(
            f"--ray {address} is a Ray Client's address: start the run on a node of the cluster with --ray auto, by `ray job submit` say"
        )
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    ray = need("ray", "--ray", extra="ray")
    ours = {"include_dashboard": False, "object_store_memory": _STORE_BYTES, "_system_config": {"worker_niceness": 0}}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **(ours if address == LOCAL else {}))
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"no Ray at {address}: {reason}; start it (`ray start --head`), or give --ray alone for one of its own"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def look(config: RunConfig, address: str) -> tuple[list[Placed], str]:
    """Where Ray at ``address`` has room for the run; and what is wanting of that now, as others hold it, or nothing.

    Raises `ConfigError` where there is no Ray, or it is too small.
    """
    with connected(address) as ray:
        nodes = nodes_of(ray.nodes())
        needs = needs_of(config, nodes)
        placed = check_room(needs, nodes, config.cluster.wait)
        return placed, missing_of(needs, ray.available_resources())


class RemoteHost:
    """A `Host` that Ray has placed, or is about to place."""

    def __init__(self, ray: Any, options: dict[str, Any]) -> None:
        self._ray = ray
        self._actor = ray.remote(Host).options(**options).remote()

    def begin(self, method: str, *arguments: Any) -> Any:
        """Call without waiting; `end` takes what this returns."""
        return getattr(self._actor, method).remote(*arguments)

    def end(self, call: Any, seconds: float = _CALL_S) -> Any:
        """Raises `HostLostError`, and what the method raises."""
        errors = self._ray.exceptions
        try:
            return self._ray.get(call, timeout=seconds)
        except (errors.RayActorError, errors.GetTimeoutError) as error:
            raise HostLostError(str(error).splitlines()[0]) from error
        except errors.RayTaskError as error:
            raise error.cause from None

    def call(self, method: str, *arguments: Any, seconds: float = _CALL_S) -> Any:
        return self.end(self.begin(method, *arguments), seconds)

    def is_placed(self) -> bool:
        """Whether it answers. Raises `HostLostError`."""
        try:
            self.end(self.begin("place"), 0.1)
        except HostLostError as error:
            if isinstance(error.__cause__, self._ray.exceptions.GetTimeoutError):
                return False
            raise
        return True

    def forget(self) -> None:
        """End the actor, and what it has started."""
        self._ray.kill(self._actor)


class Hosts:
    """What the cluster holds for one run; made by `reserve`."""

    def __init__(self, ray: Any, config: RunConfig, needs: Sequence[Need], group: Any) -> None:
        self._ray, self._config = ray, config
        self._needs = {need.name: need for need in needs}
        self._group = group
        self._first = {need.name: sum(one.count for one in needs[:place]) for place, need in enumerate(needs)}

    @classmethod
    def reserve(cls, ray: Any, config: RunConfig, tell: Callable[[str], None]) -> Hosts:
        """Have Ray hold room for all of the run's processes, or for none.

        Raises
        ------
        ConfigError
            The cluster is too small, also once ``cluster.wait`` is over.
        ClusterError
            It is large enough, but others hold what is needed.
        """
        from ray.util.placement_group import placement_group

        wait = config.cluster.wait
        deadline = time.monotonic() + wait
        while True:
            nodes = nodes_of(ray.nodes())
            needs = needs_of(config, nodes)
            try:
                check_room(needs, nodes, wait)
                break
            except ConfigError:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(_POLL_S)
        group = placement_group([need.bundle for need in needs for _ in range(need.count)], strategy="PACK")
        if not group.wait(1.0):
            tell("waiting for what other work on the cluster holds")
            if not group.wait(wait + _PLACED_S):
                free = ray.available_resources()
                raise ClusterError(
                    f"the cluster is large enough, but {free.get('CPU', 0):g} CPUs and {free.get('GPU', 0):g} GPUs are all of it that is "
                    "free: end what else runs there (`ray status` shows it), or raise cluster.wait"
                )
        return cls(ray, config, needs, group)

    def count(self, name: str) -> int:
        """Processes of this name that there is room for from the beginning."""
        return self._needs[name].count

    def host(self, name: str, number: int) -> RemoteHost:
        """A new actor in place ``number`` of ``name``; beyond `count`, wherever the cluster has room. Raises `ConfigError` without any."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        need = self._needs[name]
        options: dict[str, Any] = {"num_cpus": need.cpus, "num_gpus": need.gpus, "max_restarts": 0}
        if number < need.count:
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._group, placement_group_bundle_index=self._first[name] + number
            )
        return RemoteHost(self._ray, options)

    def check_more(self, name: str, count: int) -> None:
        """Raises `ConfigError` where the cluster would not hold ``count`` of ``name``."""
        check_room(with_more(list(self._needs.values()), name, count), nodes_of(self._ray.nodes()), 0.0)

    def release(self) -> None:
        from ray.util.placement_group import remove_placement_group

        remove_placement_group(self._group)
