"""The processes that train one student together, as ``torchrun`` starts them: who they are, and how rank 0 speaks to the others.

Rank 0 drives; the others do what it tells them, one thing after another, and say how it went. What fails on one is told to all through the
store that they met by, so that each ends with the cause and not with a broken connection.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bbopd.config import ParallelConfig
from bbopd.errors import BbopdError, ConfigError, RankError, TrainingError
from bbopd.modeling import resolve_device
from bbopd.trainer.heartbeat import Heartbeat
from bbopd.trainer.messages import buffers, describe, rebuild
from bbopd.types import DistillBatch

_PATIENCE = timedelta(days=7)  # rank 0 may sample, score and evaluate for long between two orders
_FAILURE = "failure"
_WAIT_FOR_CAUSE_S = 1.0
_LOST = ("closed by peer", "reset by peer", "timed out", "timeout", "broken pipe", "refused", "socket", "peer")


class Ranks:
    """One rank's place among all; made by `join`, over with `dismiss` on rank 0 and `heed_end` on the others. ``life`` knows who lives.

    ``turn`` is held by rank 0 from an order until its own part of it is done, as orders come from several threads.
    """

    def __init__(self, rank: int, size: int, device: torch.device, store: dist.Store, parallel: ParallelConfig, life: Heartbeat) -> None:
        self.rank, self.size, self.device, self.life = rank, size, device, life
        self.turn = threading.Lock()
        self._store, self._timeout = store, parallel.timeout
        replicas = parallel.replicas
        if replicas == 1:
            self.mesh: DeviceMesh = init_device_mesh(device.type, (size,), mesh_dim_names=("shard",))
        else:
            self.mesh = init_device_mesh(device.type, (replicas, size // replicas), mesh_dim_names=("replicate", "shard"))
        self._orders = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.checkpoints = dist.new_group(backend="gloo", timeout=timedelta(seconds=parallel.timeout))
        """A group of its own: checkpoints are written while training goes on."""

    @classmethod
    def join(cls, device: str, parallel: ParallelConfig) -> Ranks:
        """Meet the other ranks, by the variables that ``torchrun`` sets; ``device`` is `StudentConfig.device`.

        Raises
        ------
        ConfigError
            ``parallel.replicas`` does not divide the number of ranks, or a device by its number.
        RankError
            Not all came within ``parallel.timeout`` seconds.
        """
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        if size % parallel.replicas:
            raise ConfigError(f"train.parallel.replicas {parallel.replicas} does not divide the {size} ranks of the run")
        place = _device_of(device)
        backend = "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo"
        timeout = timedelta(seconds=parallel.timeout)
        try:
            store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
            life = Heartbeat(rank, size, dist.PrefixStore("bbopd", store.clone()), parallel.timeout)
            return cls(rank, size, place, dist.PrefixStore("bbopd", store), parallel, life)
        except RuntimeError as error:
            raise RankError(f"rank {rank} has not met the {size - 1} others within {parallel.timeout} s: {_first_line(error)}") from error

    # ------------------------------------------------------------ orders and answers

    def tell(self, **order: Any) -> None:
        """Rank 0: what the others, who are in `hear`, shall do next. Raises `RankError` where one of them is lost."""
        self.life.require_all()
        with self.together():
            self._broadcast(json.dumps(order).encode())

    def hear(self) -> dict[str, Any]:
        """The others: the next order, for which they wait as long as all ranks live."""
        self.life.doing("waiting for rank 0")
        heard: dict[str, Any] = json.loads(self._broadcast(None))
        return heard

    def gather(self, record: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What each rank says of itself, in JSON, in the order of ranks; all take part, and all hear it."""
        told = json.dumps(record).encode()
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(told)]))
        longest = max(int(size) for size in sizes)
        said = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(said, _bytes(told.ljust(longest)))
        return [json.loads(one.numpy().tobytes()) for one in said]

    def send(self, shares: Sequence[Sequence[DistillBatch]]) -> None:
        """Rank 0: to every other rank its share of the batches."""
        sending: list[tuple[dist.Work, Tensor]] = []  # the tensors must outlive their way

        def post(tensor: Tensor, rank: int) -> None:
            work = dist.isend(tensor, rank)
            assert work is not None, "rank 0 is in the group"
            sending.append((work, tensor))

        for rank, share in enumerate(shares):
            if rank != self.rank:
                tensors: list[Tensor] = []
                header = _bytes(json.dumps(describe(list(share), tensors)).encode())
                for tensor in (torch.tensor([len(header)]), header, *(one for one in tensors if one.numel())):
                    post(tensor, rank)
        for work, _ in sending:
            work.wait()

    def receive(self) -> list[DistillBatch]:
        """The others: what `send` has for this rank."""
        size = torch.empty(1, dtype=torch.int64)
        dist.recv(size, 0)
        header = torch.empty(int(size), dtype=torch.uint8)
        dist.recv(header, 0)
        described = json.loads(header.numpy().tobytes())
        tensors = list(buffers(described))
        for tensor in tensors:
            if tensor.numel():
                dist.recv(tensor, 0)
        batches: list[DistillBatch] = rebuild(described, iter(tensors))
        return batches

    def _broadcast(self, told: bytes | None) -> bytes:
        size = torch.tensor([0 if told is None else len(told)])
        self._wait(dist.broadcast(size, 0, group=self._orders, async_op=True))
        text = torch.empty(int(size), dtype=torch.uint8) if told is None else _bytes(told)
        self._wait(dist.broadcast(text, 0, group=self._orders, async_op=True))
        return text.numpy().tobytes()

    def _wait(self, work: dist.Work | None) -> None:
        """For a collective that may take as long as it likes, but no longer than all ranks live."""
        assert work is not None, "all ranks are in the group"
        while True:
            try:
                work.wait(timedelta(seconds=self.life.interval))
                return
            except RuntimeError:
                if work.is_completed():  # it has failed
                    raise
                self.life.require_all()

    # ------------------------------------------------------------ failures

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what ranks do with each other: raises `RankError` where another one fails, and tells the others where this one does."""
        try:
            yield
        except (RankError, TrainingError):  # what must not be applied is so on all of them, and rank 0 decides
            raise
        except BaseException as error:
            if isinstance(error, RuntimeError) and (cause := self._cause(error)) is not None:
                raise RankError(cause) from error
            self.fail(error)
            raise

    def fail(self, error: BaseException) -> None:
        """Leave word for the others of what this rank ends with; the first word stands."""
        said = {"rank": self.rank, "error": _said_of(error)}
        if self.life.is_cut_off:
            return
        with suppress(RuntimeError):  # the store is gone with whoever held it
            self._store.compare_set(_FAILURE, "", json.dumps(said))

    def _cause(self, error: RuntimeError) -> str | None:
        """Why a call of the backend has failed, where that is another rank's doing."""
        line = _first_line(error)
        said = self._left_word()
        if said is not None:
            return None if said["rank"] == self.rank else f"rank {said['rank']} has failed: {said['error']}"
        if any(word in line.lower() for word in _LOST):
            return (
                f"rank {self.rank} has lost another rank, which ended without a word or did not answer within train.parallel.timeout "
                f"({self._timeout} s): {self.life.suspects()} ({line}); the same command goes on from the last checkpoint"
            )
        return None

    def _left_word(self) -> dict[str, Any] | None:
        """What `fail` was told on any rank, which has a moment to get to it."""
        if self.life.is_cut_off:
            return None
        deadline = time.monotonic() + _WAIT_FOR_CAUSE_S
        with suppress(RuntimeError):  # the store is gone with whoever held it
            while time.monotonic() < deadline:
                if self._store.check([_FAILURE]):
                    said: dict[str, Any] = json.loads(self._store.get(_FAILURE))
                    return said
                time.sleep(0.02)
        return None

    # ------------------------------------------------------------ the end

    def dismiss(self, error: BaseException | None) -> None:
        """Rank 0: end the run, with what it has failed of."""
        with suppress(RankError):
            self.tell(do="end", error=None if error is None else _said_of(error))
            self._leave()

    def heed_end(self, order: Mapping[str, Any]) -> None:
        """The others: what `dismiss` has told them. Raises `RankError` where rank 0 has failed."""
        self._leave()
        if order["error"] is not None:
            raise RankError(f"rank 0 has failed: {order['error']}")

    def _leave(self) -> None:
        self.life.end()
        with suppress(RuntimeError):
            dist.barrier(self.checkpoints)
            dist.destroy_process_group()


def _device_of(device: str) -> torch.device:
    """This rank's own: the GPU of its number on this machine, or the CPU."""
    if ":" in device:
        raise ConfigError(f"student.device {device} names one device for all ranks: set it to cuda, cpu or auto")
    place = resolve_device(device)
    if place.type == "cuda":
        place = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(place)
    return place


def _bytes(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _said_of(error: BaseException) -> str:
    return str(error) if isinstance(error, BbopdError) else f"{type(error).__name__}: {error}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
