"""One replica of a teacher: the connection to it, who it says it is, and how it has behaved of late."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence
from dataclasses import replace

import grpc

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import ConfigError, TeacherError
from bbopd.rpc.channel import fetch_info, open_channel
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_info
from bbopd.rpc.security import ClientAccess
from bbopd.teachers.backoff import Health
from bbopd.types import TeacherInfo

__all__ = ["Endpoint", "common_info", "connect_endpoints", "pushback_seconds"]

# What makes two teachers the same one: the rest of their descriptions are limits and prices.
_IDENTITY = (
    "model",
    "revision",
    "weights_version",
    "vocab_size",
    "vocab_sha256",
    "tokenizer_sha256",
    "chat_template_sha256",
    "offers",
)


class Endpoint(Health):
    """A connection to one replica."""

    def __init__(self, target: str, channel: grpc.aio.Channel, info: TeacherInfo) -> None:
        super().__init__()
        self.target = target
        self.info = info
        self.stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        self.inflight_tokens = 0
        """Tokens of all that was given to it and is not answered yet."""
        self.refusal = ""
        """Why it is not asked again in this pass, where that is so."""
        self._channel = channel

    async def check_identity(self, seconds: float) -> None:
        """Ask it once more who it is: what listens there may have been started anew.

        Raises
        ------
        grpc.aio.AioRpcError : it cannot be reached, or not within ``seconds``.
        TeacherError : it is another teacher now.
        """
        request = pb.GetInfoRequest(protocol_min=PROTOCOL_VERSION, protocol_max=PROTOCOL_VERSION)
        response = await self.stub.GetInfo(request, timeout=seconds)
        try:
            now = decode_info(response.info)
        except ValueError as error:
            raise TeacherError(f"teacher at {self.target} describes itself badly: {error}") from None
        name, was, is_now = _first_difference(self.info, now)
        if name:
            raise TeacherError(
                f"teacher at {self.target} is another one now: its {name} was {was!r} when the run began and is {is_now!r}; "
                "what it says would not continue what it said: serve the first one again, or begin a new run"
            )

    async def close(self) -> None:
        await self._channel.close()


async def connect_endpoints(targets: Sequence[str], connect_timeout: float, access: ClientAccess | None = None) -> list[Endpoint]:
    """Connect to every replica, and make sure that they are the same teacher.

    Raises
    ------
    ConfigError : an address that is none, or needs TLS, none at all, or one given twice.
    TeacherError : one cannot be reached, or two are not the same teacher; it names both values.
    """
    if not targets or len(set(targets)) != len(targets):
        raise ConfigError(f"teacher targets {list(targets)} must be one or more addresses, each once")
    channels: list[grpc.aio.Channel] = []
    try:
        channels.extend(open_channel(target, access) for target in targets)
        outcomes = await asyncio.gather(
            *(fetch_info(channel, target, connect_timeout) for channel, target in zip(channels, targets, strict=True)),
            return_exceptions=True,
        )
        infos: list[TeacherInfo] = []
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome
            infos.append(outcome)
        for target, info in zip(targets[1:], infos[1:], strict=True):
            name, first, other = _first_difference(infos[0], info)
            if name:
                raise TeacherError(
                    f"{targets[0]} and {target} are not replicas of one teacher: {name} is {first!r} at the first and {other!r} at the "
                    "second; serve the same model everywhere, or take one of them out of teacher.target"
                )
    except BaseException:
        for channel in channels:
            await channel.close()
        raise
    return [Endpoint(target, channel, info) for target, channel, info in zip(targets, channels, infos, strict=True)]


def common_info(infos: Sequence[TeacherInfo]) -> TeacherInfo:
    """What can be asked of every replica: the smallest limits of all (0, unknown, limits nothing), else the first one's own."""
    return replace(
        infos[0],
        max_sequence_tokens=min((info.max_sequence_tokens for info in infos if info.max_sequence_tokens), default=0),
        max_request_tokens=min((info.max_request_tokens for info in infos if info.max_request_tokens), default=0),
        max_requests_per_second=min((info.max_requests_per_second for info in infos if info.max_requests_per_second), default=0.0),
    )


def pushback_seconds(error: grpc.aio.AioRpcError) -> float:
    """How long a refused call asks to be left alone: gRPC's ``grpc-retry-pushback-ms`` or HTTP's ``retry-after``; 0 where it does not."""
    for key, value in error.trailing_metadata() or ():
        try:
            seconds = float(value) / 1000 if key == "grpc-retry-pushback-ms" else float(value) if key == "retry-after" else 0.0
        except ValueError:
            continue
        if 0 < seconds < math.inf:
            return seconds
    return 0.0


def _first_difference(first: TeacherInfo, other: TeacherInfo) -> tuple[str, object, object]:
    """The first field of identity in which two descriptions differ, with both values; an empty name where there is none."""
    for name in _IDENTITY:
        if getattr(first, name) != getattr(other, name):
            return name, getattr(first, name), getattr(other, name)
    return "", None, None
