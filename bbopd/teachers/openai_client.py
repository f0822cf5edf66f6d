"""Requests to an OpenAI-compatible endpoint: within its rates and the budget, each with a deadline, asked again where that may help."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Generic, NoReturn, TypeVar

import httpx2

from bbopd.config import ApiConfig
from bbopd.errors import BadAnswerError, BudgetSpentError, TeacherError
from bbopd.rpc.limits import RefusedError
from bbopd.teachers.backoff import Health, RetryBudget
from bbopd.teachers.budget import Budget
from bbopd.teachers.openai_address import ApiAddress
from bbopd.teachers.openai_rate import RateLimits

__all__ = ["ApiClient", "Question"]

_RETRIES = 3  # of one question that fails or is answered badly
_CUTS = 5  # connections that may break, or stay silent, on one question before it counts as what breaks them
_CONNECT_SECONDS = 10.0
_ERROR_BYTES = 65_536  # of a refusal that are read
_BUSY = (408, 425, 429, 503, 529)  # ask later; it is nothing about the question
_NO_MONEY = ("insufficient_quota", "billing_hard_limit_reached", "billing_not_active")  # 429s that no waiting helps

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Question(Generic[Answer]):
    """One request. ``read`` takes the JSON of the answer and raises `ValueError` for what is none."""

    name: str
    url: str
    body: Mapping[str, Any]
    read: Callable[[Any], Answer]
    prompt_tokens: int
    answer_tokens: int
    max_bytes: int
    is_free: bool = False  # about the server: within the rate of requests, but no tokens and no money


class ApiClient:
    """One endpoint.

    Parameters
    ----------
    timeout : seconds one request may take.
    counters : ``retries`` and ``bad_answers`` are counted here.
    budget : where what is asked costs money.
    """

    def __init__(
        self, address: ApiAddress, limits: ApiConfig, *, timeout: float, counters: Counter[str], budget: Budget | None = None
    ) -> None:
        self.address = address
        self.health = Health()
        self.on_wire = 0
        """Requests sent and not answered, or waiting to be sent again after a failure: what a silence is counted over."""
        self.sending: set[asyncio.Task[Any]] = set()
        """Tasks with a request that has been sent and may be charged for."""
        self.answers = 0
        """Good answers so far."""
        self._http = address.open(min(timeout, _CONNECT_SECONDS))
        self._rates = RateLimits(limits.requests_per_minute, limits.tokens_per_minute)
        self._timeout = timeout
        self._counters = counters
        self._budget = budget
        self._retries = RetryBudget()
        self._trial = asyncio.Lock()  # one at a time, until a server that failed has answered one

    async def close(self) -> None:
        await self._http.aclose()

    async def get(self, path: str) -> Any:
        """What the server says of itself; None where it knows no such path. Raises `TeacherError`."""
        try:
            return await self.ask(Question(f"GET {path}", f"{self.address.url}/{path}", {}, lambda said: said, 0, 0, 2**24, is_free=True))
        except RefusedError as error:
            if error.code == "not_offered":
                return None
            raise

    async def ask(self, question: Question[Answer], *, retries: int = _RETRIES) -> Answer:
        """The answer to one question, asked again where that may help.

        Raises
        ------
        RefusedError : it is not answered, and would not be if it were asked again.
        BadAnswerError : its answers failed validation, the last of ``retries + 1`` too.
        TeacherError : it failed as often for another reason.
        BudgetSpentError : it might cost more than is left.
        """
        self._retries.note_request()
        failures = cuts = 0
        while True:
            await self._rates.wait(question.prompt_tokens + question.answer_tokens)
            self.on_wire += 1
            try:
                async with self._turn():
                    since = self.health.faults
                    answer = await self._once(question)
                self.health.note_success()
                self.answers += 1
                return answer
            except BadAnswerError as error:
                self._counters["bad_answers"] += 1
                failures += 1
                if failures > retries:
                    raise
                self.health.note_failure(str(error), since=since)
            except RefusedError as error:
                failures += error.code != "unavailable"
                cuts += isinstance(error, _CutError)
                if not error.is_retryable or failures > retries or cuts > _CUTS:
                    raise
                self.health.note_failure(str(error), min(error.retry_after, self._timeout), since=since)
            finally:
                self.on_wire -= 1
            self._counters["retries"] += 1
            self.on_wire += 1
            try:
                await asyncio.sleep(self._retries.take_retry())
            finally:
                self.on_wire -= 1

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """Until the server may be asked: a server that failed is asked one thing at a time until it has answered."""
        while self.health.faults:
            async with self._trial:
                while seconds := self.health.rest_seconds:
                    await asyncio.sleep(seconds)
                if self.health.faults:
                    yield
                    return
        yield

    async def _once(self, question: Question[Answer]) -> Answer:
        """Ask once, and settle what it cost, whatever happens."""
        budget = None if question.is_free else self._budget
        reservation = None if budget is None else await budget.reserve(question.prompt_tokens, question.answer_tokens)
        try:
            body = await self._send(question)
        except _NotPaidError as error:
            if budget is not None and reservation is not None:
                budget.release(reservation)
            raise error.reason from None
        except BaseException:  # cut off, or given up: it may be paid
            if budget is not None and reservation is not None:
                budget.settle(reservation)
            raise
        if budget is not None and reservation is not None:
            budget.settle(reservation, *_usage(body))
        return self._read(question, body)

    async def _send(self, question: Question[Answer]) -> Any:
        """The JSON of an answer. Raises `_NotPaidError` where there is none that anyone would charge for."""
        task = asyncio.current_task()
        assert task is not None
        self.sending.add(task)
        try:
            async with (
                asyncio.timeout(self._timeout),
                self._http.stream(
                    "POST" if question.body else "GET",
                    question.url,
                    json=question.body or None,
                    extensions=self.address.extensions,
                ) as response,
            ):
                if response.status_code != 200:
                    self._refuse(question, response, await _read_at_most(response, _ERROR_BYTES))
                content = await _read_at_most(response, question.max_bytes)
                if len(content) > question.max_bytes:
                    raise BadAnswerError(f"the answer has more than {question.max_bytes} bytes")
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout, httpx2.UnsupportedProtocol) as error:
            raise _NotPaidError(RefusedError("unavailable", self._describe(error), is_retryable=True)) from None
        except httpx2.HTTPError as error:
            raise _CutError("unavailable", self._describe(error), is_retryable=True) from None
        except TimeoutError:
            raise _CutError("unavailable", f"no answer within {self._timeout:g} s (teacher.timeout)", is_retryable=True) from None
        finally:
            self.sending.discard(task)
        try:
            return json.loads(content, parse_constant=_reject_constant)
        except (ValueError, RecursionError) as error:
            raise BadAnswerError(f"the answer is no JSON: {error}") from None

    def _read(self, question: Question[Answer], body: Any) -> Answer:
        try:
            return question.read(body)
        except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            raise BadAnswerError(_says(error)) from None

    def _refuse(self, question: Question[Answer], response: httpx2.Response, content: bytes) -> NoReturn:
        """Turn an answer that is a refusal into the error that says what to do about it."""
        status = response.status_code
        code, said = _error_of(content)
        if self.address.token is not None:
            said = self.address.token.hidden_in(said)
        text = f"HTTP {status}" + (f": {said}" if said else "")
        if status == 402 or code in _NO_MONEY:
            raise _NotPaidError(
                BudgetSpentError(f"the account at {self.address.target} has no money left ({text}): add some, and the same command goes on")
            )
        if status in (401, 403):
            raise _NotPaidError(RefusedError("invalid", f"{text}: check teacher.token_file or token_env"))
        if status in _BUSY:
            raise _NotPaidError(RefusedError("unavailable", text, is_retryable=True, retry_after=_retry_after(response)))
        if status in (404, 405, 501):
            raise _NotPaidError(RefusedError("not_offered", f"{text} at {question.url}"))
        raise _NotPaidError(RefusedError("internal" if status >= 500 else "invalid", text, is_retryable=status >= 500))

    def _describe(self, error: Exception) -> str:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return said if self.address.token is None else self.address.token.hidden_in(said)


class _CutError(RefusedError):
    """A request that was sent, and whose answer did not come."""


class _NotPaidError(Exception):
    """A failure of which it is known that it costs nothing; ``reason`` is what it is."""

    def __init__(self, reason: TeacherError) -> None:
        super().__init__(str(reason))
        self.reason = reason


async def _read_at_most(response: httpx2.Response, limit: int) -> bytes:
    """The body, or its beginning where it is longer than ``limit``."""
    parts: list[bytes] = []
    size = 0
    async for part in response.aiter_bytes():
        parts.append(part)
        size += len(part)
        if size > limit:
            break
    return b"".join(parts)


def _error_of(content: bytes) -> tuple[str, str]:
    """(code, message) of a refusal's body, as far as it has them; the message cut to one short line."""
    try:
        said = json.loads(content)
    except (ValueError, RecursionError):
        said = content.decode(errors="replace")
    error = said.get("error", said) if isinstance(said, Mapping) else said
    code, message = "", error
    if isinstance(error, Mapping):
        code = str(error.get("code") or error.get("type") or "")
        message = error.get("message") or error.get("detail") or ""
    lines = str(message).split()
    return code, " ".join(lines)[:300]


def _retry_after(response: httpx2.Response) -> float:
    """Seconds that a refusal asks to wait: a number, or an HTTP date; 0 where it does not."""
    value = response.headers.get("retry-after", "").strip()
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
        except (ValueError, TypeError):
            return 0.0
    return seconds if 0 < seconds < math.inf else 0.0


def _usage(body: Any) -> tuple[int | None, int | None]:
    """Tokens that an answer says were charged; None where it does not say it properly."""
    said = body.get("usage") or body.get("meta_info") if isinstance(body, Mapping) else None
    if not isinstance(said, Mapping):
        return None, None
    prompt, answer = (said.get(name) for name in ("prompt_tokens", "completion_tokens"))
    return _count(prompt), _count(answer)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**40 else None


def _reject_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _says(error: Exception) -> str:
    return str(error) if isinstance(error, ValueError) else f"it is not formed as it should be ({type(error).__name__}: {error})"
