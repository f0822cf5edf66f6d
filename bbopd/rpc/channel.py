"""The client's way to a teacher: an address, a channel with sane options, and the first question."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import urlsplit

import grpc

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import ConfigError, TeacherError
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_info
from bbopd.rpc.security import ClientAccess, is_loopback
from bbopd.types import TeacherInfo

__all__ = ["MESSAGE_BYTES", "channel_options", "describe", "fetch_info", "open_channel", "parse_target"]

MESSAGE_BYTES = 16 * 2**20
"""Largest message taken by either side: chunks are 1 to 2 MiB, only a request with many candidates is larger."""


def channel_options() -> list[tuple[str, int]]:
    """gRPC options that both sides set."""
    return [
        ("grpc.max_receive_message_length", MESSAGE_BYTES),
        ("grpc.max_send_message_length", MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 60_000),  # a teacher whose cores are all busy may be slow to say that it lives
        ("grpc.http2.min_ping_interval_without_data_ms", 30_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def parse_target(target: str, setting: str = "teacher") -> tuple[str, int]:
    """Host and port of ``grpc://host:port``. Raises `ConfigError` where it is something else."""
    try:
        parts = urlsplit(target)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or not port or parts.scheme != "grpc" or parts.path not in ("", "/"):
        raise ConfigError(f"{setting} target {target!r} is not an address: write grpc://host:port, such as grpc://localhost:7070")
    return host, port


def open_channel(target: str, access: ClientAccess | None = None, *, setting: str = "teacher") -> grpc.aio.Channel:
    """A channel that connects on first use, by itself: no proxy, no sharing, no hidden retries.

    ``setting`` is the section of the configuration that names ``target``. Raises `ConfigError` where that is no address, or leaves this
    machine without TLS.
    """
    host, port = parse_target(target, setting)
    access = access or ClientAccess()
    if access.tls is None and not is_loopback(host):
        raise ConfigError(
            f"{setting} target {target!r} is not on this machine, which needs TLS and a token: set {setting}.tls ({{}} where its "
            f"certificate is signed by a public authority, else with ca) and {setting}.token_file; or use a tunnel, such as "
            f"ssh -L {port}:localhost:{port} {host}, with grpc://localhost:{port}"
        )
    options: list[tuple[str, Any]] = [
        *channel_options(),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1000),
    ]
    return access.channel(f"[{host}]:{port}" if ":" in host else f"{host}:{port}", options)


async def fetch_info(channel: grpc.aio.Channel, target: str, connect_timeout: float) -> TeacherInfo:
    """Ask a teacher who it is, for at most ``connect_timeout`` seconds. Raises `TeacherError` naming the target and what to try."""
    stub = teacher_pb2_grpc.TeacherServiceStub(channel)
    request = pb.GetInfoRequest(protocol_min=PROTOCOL_VERSION, protocol_max=PROTOCOL_VERSION)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + connect_timeout
    while True:
        try:
            response = await stub.GetInfo(request, timeout=max(0.05, deadline - loop.time()))
            break
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise TeacherError(f"what answers at {target} is not a bbopd teacher: check the port") from None
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                raise TeacherError(
                    f"teacher at {target} let nobody in ({describe(error)}): check teacher.token_file or token_env"
                ) from None
            if error.code() is not grpc.StatusCode.UNAVAILABLE or loop.time() + 0.2 >= deadline:
                raise TeacherError(
                    f"cannot reach a teacher at {target} within {connect_timeout:g} s ({describe(error)}): "
                    "is it running, on this port, and with TLS just where teacher.tls is set? start one "
                    "with `bbopd serve --model … --port …`, "
                    "or let the run start it with teacher.serve"
                ) from None
        await asyncio.sleep(0.2)
    if not response.protocol_min <= PROTOCOL_VERSION <= response.protocol_max:
        raise TeacherError(
            f"teacher at {target} speaks protocol {response.protocol_min}..{response.protocol_max}, this client {PROTOCOL_VERSION}: "
            "install matching versions of bbopd on both sides"
        )
    try:
        return decode_info(response.info)
    except ValueError as error:
        raise TeacherError(f"teacher at {target} describes itself badly: {error}") from None


def describe(error: grpc.aio.AioRpcError) -> str:
    """A gRPC error as one line for a person."""
    details = (error.details() or "").strip().splitlines()
    return f"{error.code().name}: {details[0][:300]}" if details else str(error.code().name)
