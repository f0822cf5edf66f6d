"""What the checks talk to a teacher with: raw messages and the codec, none of the client's own good manners."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import numpy as np

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.rpc.answers import SignalAssembler, payload_bytes
from bbopd.rpc.batches import BATCH_BYTES, add_part, parts_of
from bbopd.rpc.codec import PROTOCOL_VERSION, encode_item, fill_item
from bbopd.types import Level, Prompt, Rollout, SignalSpec, TeacherInfo, TeacherSignal

__all__ = ["Check", "FailedError", "Probe", "RawStream", "SkippedError", "require"]

_CREDIT = 2**30


class FailedError(Exception):
    """A teacher that does not keep to the protocol; the message says how."""


class SkippedError(Exception):
    """A check that has nothing to check here; the message says why."""


def require(is_so: bool, message: str) -> None:
    if not is_so:
        raise FailedError(message)


class RawStream:
    """One open `Score` call."""

    def __init__(self, call: Any, info: TeacherInfo, timeout: float, may_batch: bool) -> None:
        self.call = call
        self.takes_batches = False
        """Whether the teacher does."""
        self.largest_batch = 0
        """Messages in one, of those that came."""
        self._info = info
        self._timeout = timeout
        self._may_batch = may_batch
        self._parts: deque[pb.ScoreResponse] = deque()

    async def next(self, timeout: float | None = None) -> pb.ScoreResponse | None:
        """The next message that is no credit; None at the end of the stream. Raises `FailedError` where none comes in time."""
        while True:
            if not self._parts:
                try:
                    message = await asyncio.wait_for(self.call.read(), timeout or self._timeout)
                except TimeoutError:
                    raise FailedError(f"no answer within {timeout or self._timeout:g} s") from None
                if message is grpc.aio.EOF:
                    return None
                self._parts.extend(self._parts_of(message))
            while self._parts:
                part = self._parts.popleft()
                if part.WhichOneof("kind") != "credit":
                    return part

    def _parts_of(self, message: pb.ScoreResponse) -> Sequence[pb.ScoreResponse]:
        if message.WhichOneof("kind") != "batch":
            return (message,)
        require(self._may_batch, "a batch came to a client that had not said that it takes them")
        try:
            parts = parts_of(message)
        except ValueError as error:
            raise FailedError(f"it sent {error}") from None
        size = sum(payload_bytes(part.chunk) for part in parts)
        require(size <= BATCH_BYTES or len(parts) == 1, f"a batch of {len(parts)} messages has {size} bytes of payload, allowed are 2 MiB")
        self.largest_batch = max(self.largest_batch, len(parts))
        return parts

    async def send(self, request_id: int, rollout: Rollout, want: SignalSpec, resume_from: int = 0, replay_id: str = "") -> None:
        request = encode_item(request_id, rollout, want, resume_from)
        request.item.replay_id = replay_id
        await self.call.write(request)

    async def grant(self, count: int) -> None:
        await self.call.write(pb.ScoreRequest(credit=pb.Credit(bytes=count)))

    async def take(self, asked: dict[int, tuple[Rollout, SignalSpec]], *, grants: bool = True) -> dict[int, TeacherSignal | pb.ItemFailure]:
        """Read until every request of ``asked`` is answered, each by chunks in order, validated, or by one failure."""
        assemblers = {
            number: SignalAssembler(rollout, want, self._info.vocab_size, f"request {number}") for number, (rollout, want) in asked.items()
        }
        outcomes: dict[int, TeacherSignal | pb.ItemFailure] = {}
        while len(outcomes) < len(asked):
            message = await self.next()
            if message is None:
                raise FailedError(f"the stream ended with {len(asked) - len(outcomes)} of {len(asked)} items unanswered")
            kind = message.WhichOneof("kind")
            require(kind in ("chunk", "failure"), f"{kind} came in the middle of a stream")
            part = getattr(message, kind)
            require(part.request_id in asked, f"request {part.request_id} was answered, which was not asked")
            require(part.request_id not in outcomes, f"request {part.request_id} was answered after its end")
            if kind == "failure":
                outcomes[part.request_id] = part
                continue
            require(
                part.weights_version == self._info.weights_version,
                f"rows say that weights {part.weights_version} gave them, GetInfo says {self._info.weights_version}",
            )
            assemblers[part.request_id].add(part)
            if grants:
                await self.grant(payload_bytes(part))
            if assemblers[part.request_id].is_complete:
                outcomes[part.request_id] = assemblers[part.request_id].signal()
        return outcomes


class Probe:
    """A teacher that is being checked."""

    def __init__(self, channel: grpc.aio.Channel, info: TeacherInfo, timeout: float) -> None:
        self.channel = channel
        self.stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        self.info = info
        self.timeout = timeout
        self._random = np.random.default_rng(0)

    @property
    def levels(self) -> tuple[Level, ...]:
        """The offered levels that are scores."""
        return tuple(offer.level for offer in self.info.offers if offer.level != "text")

    def want(self, level: Level, temperature: float | None = None, top_k: int | None = None) -> SignalSpec:
        """A question that the offer for ``level`` allows, at a temperature near 1."""
        offer = self.info.offer(level)
        assert offer is not None, "asked only of what is offered"
        if temperature is None:
            temperature = min(max(1.0, offer.temperature_min), offer.temperature_max)
        if level != "topk":
            return SignalSpec(level, temperature)
        return SignalSpec(level, temperature, min(16, offer.max_top_k, self.info.vocab_size) if top_k is None else top_k)

    def any_want(self) -> SignalSpec:
        """The cheapest question that is offered."""
        level = next((level for level in ("sampled", "topk", "candidates", "full") if level in self.levels), None)
        if level is None:
            raise SkippedError("it offers no level that scores")
        return self.want(level)

    def rollout(self, want: SignalSpec, length: int = 12, prompt: int = 5) -> Rollout:
        """A random rollout, with candidates where ``want`` needs them; shorter where the teacher's sequences are."""
        if self.info.max_sequence_tokens:
            length = max(1, min(length, self.info.max_sequence_tokens - 1))
            prompt = max(1, min(prompt, self.info.max_sequence_tokens - length))
        ids = self._random.integers(0, self.info.vocab_size, prompt + length).tolist()
        name, question, answer = f"check-{self._random.integers(1 << 30)}", Prompt("check", tuple(ids[:prompt])), tuple(ids[prompt:])
        if want.level != "candidates":
            return Rollout(name, question, answer)
        offer = self.info.offer("candidates")
        assert offer is not None
        width = max(1, min(8, offer.max_top_k, self.info.vocab_size - 1))
        rows = [self._random.choice(self.info.vocab_size, width, replace=False) for _ in answer]
        candidates = np.stack(rows).astype(np.int32)
        if width > 1:
            candidates[::3, -1] = -1  # an empty slot
        return Rollout(name, question, answer, candidate_ids=candidates)

    @asynccontextmanager
    async def stream(self, credit: int = _CREDIT, *, takes_batches: bool = False) -> AsyncIterator[RawStream]:
        call = self.stub.Score()
        try:
            opening = pb.StreamOpen(protocol_version=PROTOCOL_VERSION, answer_credit_bytes=credit, takes_batches=takes_batches)
            await call.write(pb.ScoreRequest(open=opening))
            stream = RawStream(call, self.info, self.timeout, takes_batches)
            first = await stream.next()
            require(first is not None and first.WhichOneof("kind") == "accept", "the first message of a stream is not accept")
            assert first is not None
            require(first.accept.protocol_version == PROTOCOL_VERSION, f"accepted protocol {first.accept.protocol_version}, not 1")
            require(first.accept.request_credit_bytes > 0, "accept grants no request credit, so nothing could ever be sent")
            stream.takes_batches = first.accept.takes_batches
            yield stream
        finally:
            call.cancel()

    async def score(self, rollouts: Sequence[Rollout], want: SignalSpec, **options: Any) -> list[TeacherSignal]:
        """The signals of some rollouts over a stream of their own. Raises `FailedError` where one fails."""
        async with self.stream() as stream:
            for number, rollout in enumerate(rollouts, 1):
                await stream.send(number, rollout, want, **options)
            return await self._signals(stream, rollouts, want)

    async def score_together(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        """As `score`, in one message where the teacher takes that: none can be answered before it has them all."""
        async with self.stream(takes_batches=True) as stream:
            if not stream.takes_batches:
                return await self.score(rollouts, want)
            message = pb.ScoreRequest()
            for number, rollout in enumerate(rollouts, 1):
                fill_item(add_part(message, True).item, number, rollout, want)
            await stream.call.write(message)
            return await self._signals(stream, rollouts, want)

    async def _signals(self, stream: RawStream, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        asked = {number: (rollout, want) for number, rollout in enumerate(rollouts, 1)}
        outcomes = await stream.take(asked)
        signals = []
        for number in asked:
            outcome = outcomes[number]
            if not isinstance(outcome, TeacherSignal):
                raise FailedError(f"a proper item failed with {pb.FailureCode.Name(outcome.code)}: {outcome.message}")
            signals.append(outcome)
        return signals

    async def status_after(self, write: Callable[[Any], Any]) -> tuple[grpc.StatusCode, str]:
        """How a `Score` call ends that is written to by ``write``."""
        call = self.stub.Score()
        try:
            await write(call)
            while await asyncio.wait_for(call.read(), self.timeout) is not grpc.aio.EOF:
                pass
            return await call.code(), await call.details() or ""
        except grpc.aio.AioRpcError as error:
            return error.code(), error.details() or ""
        except asyncio.InvalidStateError:  # ended while we were still writing
            return await call.code(), await call.details() or ""
        except TimeoutError:
            raise FailedError(f"the stream was still open after {self.timeout:g} s") from None
        finally:
            call.cancel()


Check = Callable[[Probe], Awaitable[str]]
"""Says in a few words what was found right; raises `FailedError`, or `SkippedError` where there is nothing to check."""
