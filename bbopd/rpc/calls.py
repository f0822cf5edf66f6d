"""One open call of one client: what every call has, whether it scores (`score_call`) or writes (`write_call`)."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import grpc

from bbopd.rpc.answers import SignalCutter
from bbopd.rpc.backend import TeacherBackend
from bbopd.rpc.clients import Client, Clients
from bbopd.rpc.codec import PROTOCOL_VERSION
from bbopd.rpc.jobs import Answer, Job
from bbopd.rpc.limits import RefusedError
from bbopd.rpc.observe import Observer, client_hash
from bbopd.rpc.replay import ReplayStore, body_sha256
from bbopd.rpc.scheduler import Scheduler
from bbopd.types import Prompt, Rollout, Sampling, SignalSpec, TeacherInfo

__all__ = ["Item", "OpenCall", "Outcome", "ProtocolError", "Served", "check_version", "refusal"]

_call_numbers = itertools.count(1)


class ProtocolError(Exception):
    """A client that does not keep to the protocol, or a stream that cannot go on: ends the call with a status."""

    def __init__(self, code: grpc.StatusCode, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after = retry_after


@dataclass(eq=False, slots=True)
class Served:
    """What all calls of a server share."""

    info: TeacherInfo
    scheduler: Scheduler
    clients: Clients
    replays: ReplayStore
    observer: Observer
    backend: TeacherBackend
    is_draining: bool = False


@dataclass(eq=False, slots=True)
class Item:
    """One item from its arrival until it is answered."""

    request_id: int
    name: str
    level: str
    request_bytes: int
    prompt_tokens: int = 0
    tokens: int = 0
    """Of the answer; at most, until it is written."""
    inflight_tokens: int = 0
    """What it counts for among its client's: 0 until it was taken."""
    digest: bytes = b""
    """`input_sha256` of a rollout."""
    arrived_at: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ends an item, ready to be sent: its one message, or its rows."""

    item: Item
    outcome: str
    message: Any = None
    rows: SignalCutter | None = None
    size: int = 0


class OpenCall:
    """What a call waits for, and what is ready to be sent to it."""

    kind = ""

    def __init__(self, served: Served, client: Client, owner: str) -> None:
        self._served = served
        self._client = client
        self._owner = owner
        self._client_hash = client_hash(client.name)
        self._number = next(_call_numbers)
        self._call = served.scheduler.open_call(client)
        self._open: dict[int, Item] = {}
        self._takes_more = True
        self._ready: deque[Any] = deque()
        self._changed = asyncio.Event()
        self._opened_at = time.monotonic()
        served.observer.call_opened(self.kind, self._client_hash, self._number)

    def end_if_done(self) -> None:
        """Wake the sending side where nothing can come any more."""
        if not self._open and (self._served.is_draining or not self._takes_more):
            self._put(None)

    def end(self, error: ProtocolError) -> None:
        """End the call with a status, once what is ready has been sent."""
        self._put(error)

    def _put(self, ready: Any) -> None:
        """Queue what is ready to be sent: what the call's kind sends, the error that ends it, or None where there is no more."""
        self._ready.append(ready)
        self._changed.set()

    async def close(self) -> None:
        """Give up what is unanswered: the model will not be asked for a client that has gone."""
        dropped = len(self._open)
        for item in tuple(self._open.values()):
            self._retire(item, "dropped")
        self._served.scheduler.close_call(self._call)
        self._served.observer.call_closed(self.kind, self._client_hash, self._number, time.monotonic() - self._opened_at, dropped)

    def _accept(self, item: Item) -> None:
        if item.request_id in self._open:
            raise ProtocolError(grpc.StatusCode.INVALID_ARGUMENT, f"request_id {item.request_id} is already in use in this call")
        most = self._client.limits.items
        if len(self._open) >= most:
            raise ProtocolError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"more than {most} items are unanswered: send fewer at a time", 1.0)
        self._open[item.request_id] = item

    def _submit(
        self, item: Item, kind: SignalSpec | Sampling, payload: Rollout | Prompt, size: int, replay_id: str, resume_from: int
    ) -> None:
        """Count a checked item as in flight and let the model, or the memory of its answer, answer it."""
        if self._served.is_draining:
            raise RefusedError("unavailable", "the teacher is shutting down", is_retryable=True, retry_after=1.0)
        tokens = item.prompt_tokens + item.tokens
        self._client.take(item.name, tokens, item.request_bytes, self._retry_after())
        item.inflight_tokens = tokens
        body = body_sha256(kind, payload, item.digest) if replay_id else b""

        def deliver(answer: Answer) -> None:
            if replay_id and not isinstance(answer, RefusedError):
                self._served.replays.keep(self._owner, replay_id, body, answer)  # its client may be gone, and come back for it
            if self._call.is_open:
                self._deliver(item, payload, size, resume_from, answer)

        if replay_id and (known := self._served.replays.find(self._owner, replay_id, body)) is not None:
            self._served.observer.replayed(item.level)
            self._deliver(item, payload, 0, resume_from, known)
            return
        self._served.scheduler.submit(self._call, Job(kind, payload, tokens, size, deliver, is_kept=bool(replay_id)))

    def _retry_after(self) -> float:
        """Until about half of what its client has in flight is answered."""
        return min(30.0, max(0.1, self._served.scheduler.seconds_for(self._client.tokens // 2)))

    def _retire(self, item: Item, outcome: str) -> None:
        del self._open[item.request_id]
        if item.inflight_tokens:
            self._client.give_back(item.inflight_tokens, item.request_bytes)
        self._served.observer.item_ended(
            outcome,
            level=item.level,
            client=self._client_hash,
            call=self._number,
            request=item.request_id,
            name=item.name,
            prompt_tokens=item.prompt_tokens,
            tokens=item.tokens,
            seconds=time.monotonic() - item.arrived_at,
        )

    def _deliver(self, item: Item, payload: Rollout | Prompt, size: int, resume_from: int, answer: Answer) -> None:
        raise NotImplementedError


def check_version(version: int) -> None:
    if version != PROTOCOL_VERSION:
        raise ProtocolError(grpc.StatusCode.FAILED_PRECONDITION, f"protocol {version} is not spoken here, {PROTOCOL_VERSION} is")


def refusal(error: ValueError | RefusedError) -> RefusedError:
    return error if isinstance(error, RefusedError) else RefusedError("invalid", str(error))
