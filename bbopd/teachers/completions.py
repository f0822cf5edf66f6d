"""A teacher's own answers to one stream of prompts: each prompt is one short call, to the replica that has the least to do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Sequence

import grpc

import bbopd.rpc.teacher_pb2 as pb
from bbopd.errors import BadAnswerError, TeacherError
from bbopd.rpc.channel import describe
from bbopd.rpc.codec import PROTOCOL_VERSION, decode_completion, decode_failure, encode_prompt, encode_sampling
from bbopd.rpc.limits import RefusedError, check_prompt, check_sampling
from bbopd.teachers.backoff import RetryBudget
from bbopd.teachers.endpoint import Endpoint, pushback_seconds
from bbopd.types import Completion, Prompt, Sampling, TeacherInfo

__all__ = ["CompletionSession"]

_PROMPTS_AT_ONCE = 32  # for each replica
_RETRIES = 3  # of one prompt that fails or is answered badly
_POLL = 0.1  # seconds between looks for a replica that may be asked again
_AWAY = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
)


class CompletionSession:
    """Arguments as for `ScoreSession`."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        info: TeacherInfo,
        sampling: Sampling,
        *,
        timeout: float,
        counters: Counter[str],
        budget: RetryBudget,
    ) -> None:
        check_sampling(sampling, info)
        self._endpoints = endpoints
        self._info = info
        self._sampling = sampling
        self._timeout = timeout
        self._patience = timeout if len(endpoints) == 1 else timeout / 2
        self._counters = counters
        self._budget = budget

    async def run(self, prompts: AsyncIterator[Prompt]) -> AsyncGenerator[Completion, None]:
        """Answers as each is ready. Raises `TeacherError` where none comes for ``timeout`` seconds, or a prompt is refused."""
        running: set[asyncio.Task[Completion]] = set()
        try:
            async for prompt in prompts:
                check_prompt(prompt, self._sampling, self._info)
                while len(running) >= _PROMPTS_AT_ONCE * len(self._endpoints):
                    yield await self._first(running)
                running.add(asyncio.create_task(self._complete(prompt)))
            while running:
                yield await self._first(running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _first(self, running: set[asyncio.Task[Completion]]) -> Completion:
        """Take one finished task out of the set, waiting for it within the time limit."""
        done, _ = await asyncio.wait(running, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            troubles = "; ".join(f"{endpoint.target}: {endpoint.trouble}" for endpoint in self._endpoints if endpoint.faults)
            raise TeacherError(
                f"teacher at {self._targets} has not written an answer for {self._timeout:g} s (teacher.timeout)"
                + (f" (last trouble: {troubles})" if troubles else "")
            )
        task = done.pop()
        running.remove(task)
        return task.result()

    async def _complete(self, prompt: Prompt) -> Completion:
        self._budget.note_request()
        failures = 0
        last: Endpoint | None = None
        while True:
            last = endpoint = await self._pick(last)
            tokens = len(prompt.token_ids) + self._sampling.max_new_tokens
            endpoint.inflight_tokens += tokens
            try:
                completion = await self._ask(endpoint, prompt)
            except BadAnswerError as error:
                self._counters["bad_answers"] += 1
                failures += 1
                self._note_failure(endpoint, prompt, error, failures)
            except RefusedError as error:
                failures += error.code not in ("unavailable", "over_limit")
                if not error.is_retryable:
                    failures = _RETRIES + 1
                self._note_failure(endpoint, prompt, error, failures, min(error.retry_after, self._timeout))
            else:
                endpoint.note_success()
                return completion
            finally:
                endpoint.inflight_tokens -= tokens
            self._counters["retries"] += 1
            await asyncio.sleep(self._budget.take_retry())

    def _note_failure(self, endpoint: Endpoint, prompt: Prompt, error: TeacherError, failures: int, retry_after: float = 0.0) -> None:
        endpoint.note_failure(str(error), retry_after)
        if failures > _RETRIES:
            raise TeacherError(f"teacher at {endpoint.target} did not answer prompt {prompt.prompt_id}: {error}") from None

    async def _pick(self, last: Endpoint | None) -> Endpoint:
        """The replica with the least to do among those that may be asked; where there is another, not the one that just failed."""
        while True:
            ready = [endpoint for endpoint in self._endpoints if not endpoint.rest_seconds]
            others = [endpoint for endpoint in ready if endpoint is not last]
            if ready:
                return min(others or ready, key=lambda endpoint: endpoint.inflight_tokens)
            await asyncio.sleep(_POLL)

    async def _ask(self, endpoint: Endpoint, prompt: Prompt) -> Completion:
        request = pb.GenerateRequest(
            protocol_version=PROTOCOL_VERSION, prompts=[encode_prompt(1, prompt)], sampling=encode_sampling(self._sampling)
        )
        try:
            responses = [response async for response in endpoint.stub.Generate(request, timeout=self._patience)]
        except grpc.aio.AioRpcError as error:
            is_away = error.code() in _AWAY
            raise RefusedError("unavailable", describe(error), is_retryable=is_away, retry_after=pushback_seconds(error)) from None
        if len(responses) != 1:
            raise BadAnswerError(f"prompt {prompt.prompt_id}: {len(responses)} answers came to one question")
        answer = responses[0]
        if answer.WhichOneof("kind") == "failure":
            raise decode_failure(answer.failure)
        if answer.completion.request_id != 1:
            raise BadAnswerError(
                f"prompt {prompt.prompt_id}: the answer is to request {answer.completion.request_id}, which was never made"
            )
        if answer.completion.weights_version != endpoint.info.weights_version:
            raise RefusedError(
                "invalid",
                f"it was written by weights version {answer.completion.weights_version}, at the start it was "
                f"{endpoint.info.weights_version}: this is another teacher now, and a run cannot change its teacher",
            )
        try:
            return decode_completion(answer.completion, prompt, self._sampling, self._info.vocab_size)
        except ValueError as error:
            raise BadAnswerError(f"prompt {prompt.prompt_id}: {error}") from None

    @property
    def _targets(self) -> str:
        return ", ".join(endpoint.target for endpoint in self._endpoints)
