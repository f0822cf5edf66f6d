"""Checks of what a teacher must refuse: bad items alone, bad streams with a status, and none of it harms the next client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np

import bbopd.rpc.teacher_pb2 as pb
from bbopd.rpc.codec import LEVEL_NUMBERS, encode_item
from bbopd.rpc.conformance.probe import Check, FailedError, Probe, require
from bbopd.rpc.tensors import encode_tensor
from bbopd.types import LEVELS

__all__ = ["CHECKS", "token_check"]

Change = Callable[[pb.ScoreItem], None]


def _bad_items(probe: Probe) -> list[tuple[str, Change, str]]:
    """What is wrong, how a good item is made so, and the code it must fail with."""
    info, want = probe.info, probe.any_want()
    offer = info.offer(want.level)
    assert offer is not None

    def with_ids(ids: list[int], prompt_tokens: int = 2) -> Change:
        def change(item: pb.ScoreItem) -> None:
            item.token_ids.CopyFrom(encode_tensor(np.array(ids, np.int32)))
            item.prompt_tokens = prompt_tokens
            if item.HasField("candidate_ids"):
                item.candidate_ids.CopyFrom(encode_tensor(np.zeros((max(1, len(ids) - prompt_tokens), 1), np.int32)))

        return change

    def with_fields(part: Callable[[Any], Any], **fields: Any) -> Change:
        def change(item: pb.ScoreItem) -> None:
            for name, value in fields.items():
                setattr(part(item), name, value)

        return change

    def wanting(**fields: Any) -> Change:
        return with_fields(lambda item: item.want, **fields)

    cases = [
        ("a token id outside the vocabulary", with_ids([1, 1, info.vocab_size]), "INVALID"),
        ("a negative token id", with_ids([1, 1, -1]), "INVALID"),
        ("no response tokens", with_ids([1, 1]), "INVALID"),
        ("no prompt", with_ids([1, 1, 1], 0), "INVALID"),
        ("more prompt tokens than tokens", with_ids([1, 1, 1], 9), "INVALID"),
        ("nothing at all", with_ids([], 0), "INVALID"),
        ("a tensor whose bytes do not match its shape", with_fields(lambda item: item.token_ids, data=b"\1\0\0\0\1"), "INVALID"),
        ("a tensor of an unknown dtype", with_fields(lambda item: item.token_ids, dtype=0), "INVALID"),
        ("a first row beyond the last", with_fields(lambda item: item, resume_from=10_000_000), "INVALID"),
        ("no level", wanting(level=0, top_k=0), "INVALID"),
        ("level text", wanting(level=pb.LEVEL_TEXT, top_k=0), "INVALID or NOT_OFFERED"),
    ]
    if want.level != "full":  # which ignores the temperature
        cases += [
            ("a temperature of 0", wanting(temperature=0.0), "INVALID"),
            ("a negative temperature", wanting(temperature=-1.0), "INVALID"),
            ("a temperature that is NaN", wanting(temperature=float("nan")), "INVALID"),
            ("a temperature above the offer", wanting(temperature=offer.temperature_max * 2 + 1), "NOT_OFFERED"),
        ]
    if info.max_sequence_tokens:
        cases.append(("more tokens than a sequence may have", with_ids([1] * (info.max_sequence_tokens + 1)), "TOO_LONG"))
    if topk := info.offer("topk"):
        number = LEVEL_NUMBERS["topk"]
        cases += [
            (
                "more ids than offered",
                _plain(wanting(level=number, top_k=topk.max_top_k + 1, temperature=topk.temperature_max)),
                "NOT_OFFERED",
            ),
            ("top-k without k", _plain(wanting(level=number, top_k=0, temperature=topk.temperature_max)), "NOT_OFFERED or INVALID"),
        ]
    for level in LEVELS:
        if level != "text" and info.offer(level) is None:
            ask = wanting(level=LEVEL_NUMBERS[level], top_k=0)
            ask = _with_candidates(ask) if level == "candidates" else _plain(ask)
            cases.append((f"level {level}, which is not offered", ask, "NOT_OFFERED"))
    if info.offer("candidates"):
        cases += _bad_candidates(probe)
    return cases


def _bad_candidates(probe: Probe) -> list[tuple[str, Change, str]]:
    want = probe.want("candidates")

    def asking(ids: list[list[int]] | None) -> Change:
        def change(item: pb.ScoreItem) -> None:
            item.want.level, item.want.temperature, item.want.top_k = LEVEL_NUMBERS["candidates"], want.temperature, 0
            item.ClearField("candidate_ids")
            if ids is not None:
                item.candidate_ids.CopyFrom(encode_tensor(np.array(ids, np.int32)))

        return change

    rows = len(probe.rollout(want))
    return [
        ("candidates without ids", asking(None), "INVALID"),
        ("candidates of another length", asking([[1]] * (rows + 1)), "INVALID"),
        ("a candidate twice", asking([[1, 1]] * rows), "INVALID"),
        ("a candidate outside the vocabulary", asking([[probe.info.vocab_size]] * rows), "INVALID"),
        ("a candidate below -1", asking([[-2]] * rows), "INVALID"),
    ]


def _with_candidates(change: Change) -> Change:
    """For level candidates: one id for every response token."""

    def both(item: pb.ScoreItem) -> None:
        rows = len(item.token_ids.data) // 4 - item.prompt_tokens
        item.candidate_ids.CopyFrom(encode_tensor(np.ones((rows, 1), np.int32)))
        change(item)

    return both


def _plain(change: Change) -> Change:
    """For a level that takes no candidates."""

    def both(item: pb.ScoreItem) -> None:
        item.ClearField("candidate_ids")
        change(item)

    return both


async def bad_items_fail_alone(probe: Probe) -> str:
    want = probe.any_want()
    cases = _bad_items(probe)
    async with probe.stream() as stream:
        for number, (what, change, codes) in enumerate(cases, 1):
            request = encode_item(number, probe.rollout(want), want)
            change(request.item)
            await stream.call.write(request)
            message = await stream.next()
            require(message is not None, f"{what} ended the stream: an item must fail alone")
            assert message is not None
            require(message.WhichOneof("kind") == "failure", f"{what} was answered with {message.WhichOneof('kind')}, not refused")
            failure = message.failure
            require(failure.request_id == number, f"{what} failed under number {failure.request_id}, asked was {number}")
            code = pb.FailureCode.Name(failure.code).removeprefix("FAILURE_CODE_")
            require(code in codes.split(" or "), f"{what} failed with {code}, expected was {codes}: {failure.message}")
            require(not failure.retryable, f"{what} is said to be worth a retry")
            require(bool(failure.message), f"{what} failed without a message")
        rollout = probe.rollout(want)
        await stream.send(1000, rollout, want)
        outcome = (await stream.take({1000: (rollout, want)}))[1000]
        require(not isinstance(outcome, pb.ItemFailure), "a proper item failed after the bad ones")
    return f"{len(cases)} kinds of bad items fail with the right code, and leave the stream open"


async def bad_streams_end_with_a_status(probe: Probe) -> str:
    want = probe.any_want()
    item = encode_item(1, probe.rollout(want, 40), want)
    opening = pb.ScoreRequest(open=pb.StreamOpen(protocol_version=1, answer_credit_bytes=0))  # no credit: the item stays unanswered
    cases = [
        ("an item before open", [item], grpc.StatusCode.INVALID_ARGUMENT),
        ("a stream opened twice", [opening, opening], grpc.StatusCode.INVALID_ARGUMENT),
        ("a request_id in use", [opening, item, item], grpc.StatusCode.INVALID_ARGUMENT),
        ("an unknown protocol", [pb.ScoreRequest(open=pb.StreamOpen(protocol_version=999))], grpc.StatusCode.FAILED_PRECONDITION),
    ]
    for what, messages, expected in cases:

        async def write(call: Any, messages: list[pb.ScoreRequest] = messages) -> None:
            for message in messages:
                await call.write(message)

        code, _ = await probe.status_after(write)
        require(code is expected, f"{what} ended with {code.name}, expected was {expected.name}")
    await probe.score([probe.rollout(want)], want)
    return "four ways of breaking the protocol end the stream with the right status, and no other one"


async def cancelling_is_survived(probe: Probe) -> str:
    """A client that goes in the middle of its work is forgotten, and the next one is served."""
    want = probe.any_want()
    for _ in range(3):
        async with probe.stream() as stream:
            for number in range(1, 60):
                await stream.send(number, probe.rollout(want, 30), want)
            await stream.next()
    loop = asyncio.get_running_loop()
    started = loop.time()
    await probe.score([probe.rollout(want)], want)
    return f"after three clients that left with 180 items open, the next answer took {loop.time() - started:.2f} s"


async def duplicates_are_answered_alike(probe: Probe) -> str:
    """The same question under two numbers is two questions with one answer; a number may be used again after its end."""
    want = probe.any_want()
    rollout = probe.rollout(want)
    async with probe.stream() as stream:
        for numbers in ((1, 2), (1,)):
            for number in numbers:
                await stream.send(number, rollout, want)
            outcomes = await stream.take(dict.fromkeys(numbers, (rollout, want)))
            failed = [one for one in outcomes.values() if isinstance(one, pb.ItemFailure)]
            require(not failed, f"a duplicate failed: {failed[0].message if failed else ''}")
    return "the same tokens under another number, and a number used again, are answered"


def token_check(channel_without_token: grpc.aio.Channel) -> Check:
    """A teacher that was reached with a token must not answer without one."""

    async def check(probe: Probe) -> str:
        for method in ("GetInfo", "Score", "Generate"):
            call = channel_without_token.stream_stream(f"/bbopd.v1.TeacherService/{method}")()
            try:
                await asyncio.wait_for(call.read(), probe.timeout)
            except grpc.aio.AioRpcError as error:
                require(
                    error.code() is grpc.StatusCode.UNAUTHENTICATED,
                    f"{method} without a token ended with {error.code().name}, expected was UNAUTHENTICATED",
                )
            except TimeoutError:
                raise FailedError(f"{method} without a token was let in") from None
            else:
                raise FailedError(f"{method} without a token was answered")
            finally:
                call.cancel()
        return "no method answers without a token"

    return check


CHECKS: list[tuple[str, Check]] = [
    ("bad items", bad_items_fail_alone),
    ("bad streams", bad_streams_end_with_a_status),
    ("cancelling", cancelling_is_survived),
    ("duplicates", duplicates_are_answered_alike),
]
