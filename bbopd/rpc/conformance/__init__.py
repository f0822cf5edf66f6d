"""The conformance test of ``bbopd.v1``: what any teacher, in any language, is held to (``bbopd check-teacher``)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import BbopdError
from bbopd.rpc.channel import describe, fetch_info, open_channel
from bbopd.rpc.conformance import refusals, scoring, writing
from bbopd.rpc.conformance.probe import Check, FailedError, Probe, SkippedError, require
from bbopd.rpc.security import ClientAccess
from bbopd.types import LEVELS, TeacherInfo

__all__ = ["CheckResult", "check_teacher"]

_HASHES = ("vocab_sha256", "tokenizer_sha256", "chat_template_sha256")


@dataclass(frozen=True, slots=True)
class CheckResult:
    """One line of the report: what was checked, how it went, and what was found."""

    name: str
    status: Literal["pass", "fail", "skip"]
    detail: str
    seconds: float


async def check_teacher(target: str, access: ClientAccess | None = None, *, timeout: float = 30.0) -> AsyncIterator[CheckResult]:
    """Hold a teacher to the protocol, check by check.

    Parameters
    ----------
    target : ``grpc://host:port``.
    access : TLS and token.
    timeout : seconds any single answer may take.

    Raises
    ------
    ConfigError : a target that cannot be used.
    TeacherError : nobody there, or nobody who speaks the protocol.
    """
    access = access or ClientAccess()
    async with open_channel(target, access) as channel:
        info = await fetch_info(channel, target, timeout)
        probe = Probe(channel, info, timeout)
        for name, check in _checks(info):
            yield await _run(name, check, probe)
        if access.token is not None:
            async with open_channel(target, dataclasses.replace(access, token=None)) as bare:
                yield await _run("no token", refusals.token_check(bare), probe)


def _checks(info: TeacherInfo) -> list[tuple[str, Check]]:
    checks: list[tuple[str, Check]] = [("info", _info_is_sane), ("health", _health_is_served)]
    checks += [(f"level {level}", scoring.level_check(level)) for level in LEVELS if level != "text" and info.offer(level)]
    checks += scoring.CHECKS + refusals.CHECKS
    checks += writing.CHECKS if info.offer("text") else [("no written answers", writing.not_offered_is_refused)]
    return checks


async def _run(name: str, check: Check, probe: Probe) -> CheckResult:
    started = time.monotonic()
    status: Literal["pass", "fail", "skip"] = "fail"
    try:
        status, detail = "pass", await check(probe)
    except SkippedError as reason:
        status, detail = "skip", str(reason)
    except grpc.aio.AioRpcError as error:
        detail = f"the call ended with {describe(error)}"
    except (FailedError, BbopdError, ValueError) as error:
        detail = str(error)
    return CheckResult(name, status, detail, time.monotonic() - started)


async def _info_is_sane(probe: Probe) -> str:
    info = probe.info
    require(bool(info.model), "model is empty: say who answers")
    levels = [offer.level for offer in info.offers]
    require(bool(levels), "it offers nothing")
    require(len(levels) == len(set(levels)), f"a level is offered twice: {', '.join(levels)}")
    for offer in info.offers:
        has_ids = offer.level in ("topk", "candidates")
        require(
            offer.max_top_k >= 1 if has_ids else offer.max_top_k == 0,
            f"level {offer.level} has max_top_k {offer.max_top_k}, expected {'at least 1' if has_ids else '0'}",
        )
    require(info.max_sequence_tokens != 1, "max_sequence_tokens is 1: no room for a prompt and a response token")
    other = await probe.stub.GetInfo(pb.GetInfoRequest(protocol_min=1, protocol_max=1), timeout=probe.timeout)
    again = await teacher_pb2_grpc.TeacherServiceStub(probe.channel).GetInfo(
        pb.GetInfoRequest(protocol_min=1, protocol_max=1), timeout=probe.timeout
    )
    require(other == again, "GetInfo answers differently from one call to the next")
    unknown = [name for name in _HASHES if not getattr(info, name)]
    shown = f"{info.model}, {info.vocab_size} tokens, offers {', '.join(levels)}"
    shown += ", the tail derived as 1 minus the sum" if any(offer.tail == "derived" for offer in info.offers) else ""
    return shown + (f"; unknown: {', '.join(unknown)}" if unknown else "")


async def _health_is_served(probe: Probe) -> str:
    stub = health_pb2_grpc.HealthStub(probe.channel)
    for service in ("", "bbopd.v1.TeacherService"):
        answer = await stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=probe.timeout)
        name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        require(answer.status == health_pb2.HealthCheckResponse.SERVING, f"health of {service!r} is {name}")
    return "grpc.health.v1 says SERVING"
