"""A teacher across gRPC: rollouts stream out, signals stream in, and every failure is a named one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing

import grpc

import bbopd.rpc.teacher_pb2 as pb
import bbopd.rpc.teacher_pb2_grpc as teacher_pb2_grpc
from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.channel import describe, fetch_info, open_channel
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_completion, decode_failure, encode_prompt, encode_sampling
from bbopd.rpc.limits import RefusedError, check_prompt, check_sampling
from bbopd.teachers.score_session import ScoreSession
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherInfo

__all__ = ["RemoteTeacher"]

_PROMPTS_AT_ONCE = 32
_RETRIES = 3


class RemoteTeacher:
    """The `Teacher` protocol over a ``bbopd.v1.TeacherService``; made by `connect`."""

    def __init__(self, channel: grpc.aio.Channel, target: str, info: TeacherInfo, *, timeout: float, inflight_tokens: int) -> None:
        self.info = info
        self.target = target
        self.counters: Counter[str] = Counter(retries=0, bad_answers=0, reconnects=0)
        """How often an item was asked again, an answer failed validation, a stream was opened again."""
        self._channel = channel
        self._stub = teacher_pb2_grpc.TeacherServiceStub(channel)
        self._timeout = timeout
        self._inflight_tokens = inflight_tokens

    @classmethod
    async def connect(
        cls, target: str, *, timeout: float = 300.0, inflight_tokens: int = 8192, connect_timeout: float = 10.0
    ) -> RemoteTeacher:
        """Connect and ask the teacher who it is.

        Parameters
        ----------
        target : ``grpc://host:port``, on this machine.
        timeout : seconds without any answer, while some are due, before the teacher counts as dead.
        inflight_tokens : tokens of rollouts sent and not yet answered, prompts included.
        connect_timeout : seconds to go on trying to reach it.

        Raises
        ------
        ConfigError : a target that is no such address.
        TeacherError : it cannot be reached, speaks another protocol, or is no teacher.
        """
        channel = open_channel(target)
        try:
            info = await fetch_info(channel, target, connect_timeout)
        except BaseException:
            await channel.close()
            raise
        return cls(channel, target, info, timeout=timeout, inflight_tokens=inflight_tokens)

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Scores as each is ready, in any order; rollouts are taken from the source only as fast as the teacher answers.

        Items that fail for a while, or arrive damaged, are asked again up to 3 times; a broken stream is opened again and
        goes on where it broke.

        Items are sent in the order of the source. A teacher's answer may depend, in its last bits, on what shares its batch; the
        same rollouts get the same answers again where the teacher has no other client and all of them, prompts included, are
        within ``inflight_tokens`` (and the teacher's own ``max_request_tokens``): beyond that, what is sent when depends on
        how fast answers come.

        Raises
        ------
        TeacherError : not offered, refused, dead, or silent for ``timeout``; it names what was finished.
        """
        session = ScoreSession(
            self._stub.Score,
            self.target,
            self.info,
            want,
            timeout=self._timeout,
            inflight_tokens=self._inflight_tokens,
            counters=self.counters,
        )
        async with aclosing(session.run(rollouts)) as answers:
            async for scored in answers:
                yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """The teacher's own answers, as each is ready, in any order. Raises `TeacherError` as `score` does."""
        check_sampling(sampling, self.info)
        running: set[asyncio.Task[Completion]] = set()
        try:
            async for prompt in prompts:
                check_prompt(prompt, sampling, self.info)
                while len(running) >= _PROMPTS_AT_ONCE:
                    yield await self._first(running)
                running.add(asyncio.create_task(self._complete_one(prompt, sampling)))
            while running:
                yield await self._first(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def close(self) -> None:
        """Close the connection; calls still open are cancelled."""
        await self._channel.close()

    async def _complete_one(self, prompt: Prompt, sampling: Sampling) -> Completion:
        for attempt in range(_RETRIES + 1):
            try:
                return await self._ask(prompt, sampling)
            except BadAnswerError:
                self.counters["bad_answers"] += 1
                if attempt == _RETRIES:
                    raise
            except RefusedError as error:
                if not error.is_retryable or attempt == _RETRIES:
                    raise TeacherError(f"teacher at {self.target} did not answer prompt {prompt.prompt_id}: {error}") from None
                await asyncio.sleep(min(error.retry_after, self._timeout))
            self.counters["retries"] += 1
        raise AssertionError("the last attempt returns or raises")

    async def _ask(self, prompt: Prompt, sampling: Sampling) -> Completion:
        request = pb.GenerateRequest(
            protocol_version=PROTOCOL_VERSION, prompts=[encode_prompt(1, prompt)], sampling=encode_sampling(sampling)
        )
        try:
            responses = [response async for response in self._stub.Generate(request)]
        except grpc.aio.AioRpcError as error:
            is_away = error.code() is grpc.StatusCode.UNAVAILABLE
            raise RefusedError("unavailable", describe(error), is_retryable=is_away, retry_after=0.5) from None
        if len(responses) != 1:
            raise BadAnswerError(f"prompt {prompt.prompt_id}: {len(responses)} answers came to one question")
        if responses[0].WhichOneof("kind") == "failure":
            raise decode_failure(responses[0].failure)
        try:
            return decode_completion(responses[0].completion, prompt, sampling, self.info.vocab_size)
        except ValueError as error:
            raise BadAnswerError(f"prompt {prompt.prompt_id}: {error}") from None

    async def _first(self, running: set[asyncio.Task[Completion]]) -> Completion:
        """Take one finished task out of the set, waiting for it within the time limit."""
        done, _ = await asyncio.wait(running, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise TeacherError(f"teacher at {self.target} has not written an answer for {self._timeout:g} s (teacher.timeout)")
        task = done.pop()
        running.remove(task)
        return task.result()
