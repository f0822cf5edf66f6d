"""Who is being served: what each client has in flight, and how much it may."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bbopd.rpc.limits import RefusedError
from bbopd.rpc.request_rate import RequestRate

if TYPE_CHECKING:
    from bbopd.rpc.scheduler import Call

__all__ = ["Client", "ClientLimits", "Clients"]


@dataclass(frozen=True, slots=True)
class ClientLimits:
    """What one client may have open and in flight at a time; what is beyond is refused before the model hears of it.

    Parameters
    ----------
    tokens : of sequences taken and not answered, prompts and tokens to write included. Half of it is announced to clients
        (``max_request_tokens``), so that one whose stream broke may send all of it again before the server notices.
    request_bytes : token and candidate ids of those.
    streams : open `Score` calls.
    calls : open `Generate` calls.
    items : of one call, bad ones included, whose answer has not been taken.
    requests_per_second : calls, items and prompts, bad ones included; None: any number.
    """

    tokens: int = 524_288
    request_bytes: int = 32 * 2**20
    streams: int = 8
    calls: int = 64
    items: int = 65_536
    requests_per_second: float | None = None

    @property
    def announced_tokens(self) -> int:
        return max(1, self.tokens // 2)


@dataclass(eq=False, slots=True)
class Client:
    """One client, however many connections and calls it has."""

    name: str
    limits: ClientLimits
    rate: RequestRate = field(default_factory=RequestRate)
    calls: deque[Call] = field(default_factory=deque)
    """In the order of their turns."""
    service: float = 0.0
    """What the model has done for it, in scored tokens: the one with the least is served first."""
    pending_bytes: int = 0
    """Answers made, or being made, and not yet taken."""
    open_calls: dict[str, int] = field(default_factory=lambda: {"score": 0, "generate": 0})
    tokens: int = 0
    request_bytes: int = 0

    def count_request(self, what: str) -> None:
        """Count one request. Raises `RefusedError` where they come too often, saying when to ask again."""
        wait = self.rate.take(self.name)
        if wait:
            raise RefusedError(
                "over_limit",
                f"{what}: this client may make {self.rate.per_second:g} requests a second; ask again in {wait:.3g} s, and less often",
                is_retryable=True,
                retry_after=wait,
            )

    def open_call(self, kind: str) -> None:
        """Count one more `Score` or `Generate` call. Raises `RefusedError` where there are too many."""
        most = self.limits.streams if kind == "score" else self.limits.calls
        if self.open_calls[kind] >= most:
            raise RefusedError(
                "over_limit", f"this client already has {most} {kind} calls open, as many as it may", is_retryable=True, retry_after=1.0
            )
        self.open_calls[kind] += 1

    def close_call(self, kind: str) -> None:
        self.open_calls[kind] -= 1

    def take(self, name: str, tokens: int, request_bytes: int, retry_after: float) -> None:
        """Count one item as in flight. Raises `RefusedError` where that is more than the client may have, saying when to ask again."""
        if tokens > self.limits.tokens:
            raise RefusedError("too_long", f"{name} has {tokens} tokens, more than the {self.limits.tokens} one client may have in flight")
        for what, taken, more, most in (
            ("tokens", self.tokens, tokens, self.limits.tokens),
            ("bytes of requests", self.request_bytes, request_bytes, self.limits.request_bytes),
        ):
            if taken and taken + more > most:
                raise RefusedError(
                    "over_limit",
                    f"{name}: this client has {taken} {what} in flight and may have {most}; send less at a time",
                    is_retryable=True,
                    retry_after=retry_after,
                )
        self.tokens += tokens
        self.request_bytes += request_bytes

    def give_back(self, tokens: int, request_bytes: int) -> None:
        self.tokens -= tokens
        self.request_bytes -= request_bytes


class Clients:
    """The clients that have a call open, by name. Its sums are read by the thread of the metrics too."""

    def __init__(self, limits: ClientLimits) -> None:
        self.limits = limits
        self.rate = RequestRate(limits.requests_per_second)
        self._clients: dict[str, Client] = {}

    def __len__(self) -> int:
        return len(self._clients)

    @property
    def pending_bytes(self) -> int:
        """Answers made, or being made, and not yet taken, of all clients."""
        return sum(client.pending_bytes for client in tuple(self._clients.values()))

    def enter(self, name: str, kind: str) -> Client:
        """The client of this name with one more call. Raises `RefusedError` where it has too many, or makes them too often."""
        client = self._clients.get(name) or Client(name, self.limits, self.rate)
        client.count_request(f"a {kind} call")
        client.open_call(kind)
        self._clients[name] = client
        return client

    def leave(self, client: Client, kind: str) -> None:
        client.close_call(kind)
        if not any(client.open_calls.values()):
            del self._clients[client.name]
