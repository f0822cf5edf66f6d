"""A teacher that remembers: what was asked once, by this run or another, is not asked (nor paid) again.

A question is known by its content: who the teacher is (model, revision, weights version, vocabulary), all token ids, where the response
begins, and the signal or the sampling asked for.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from bbopd.errors import TeacherError
from bbopd.rpc.limits import check_sampling, check_want
from bbopd.teachers.answer_store import AnswerStore, StoreFullError
from bbopd.teachers.questions import Questions, ScoringQuestions, WritingQuestions
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, Teacher

__all__ = ["CachedTeacher"]

_READY = 8  # answers ready and not yet taken
_POLL = 0.2  # seconds between looks at what another process asks
_PATIENCE = 600.0  # seconds that another process may take over a question before it is asked here too
_log = logging.getLogger("bbopd.cache")

Item = TypeVar("Item")
Answer = TypeVar("Answer")
Result = TypeVar("Result")


class CachedTeacher:
    """The `Teacher` protocol over another teacher and a store of its answers.

    Parameters
    ----------
    teacher : who is asked what is not known.
    store : where answers are kept; only this object's thread uses it from now on.
    on_full : with a store that cannot be written, ``continue`` without storing, or ``stop`` with a `StoreFullError`.
    """

    def __init__(self, teacher: Teacher, store: AnswerStore, *, on_full: Literal["continue", "stop"] = "continue") -> None:
        self.info = teacher.info
        self.counters: Counter[str] = Counter(hits=0, misses=0, unstored=0, corrupt=0)
        """Questions that cost nothing, being known or asked already; those asked; answers not stored; entries found damaged."""
        self._teacher = teacher
        self._store = store
        self._stops_when_full = on_full == "stop"
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="bbopd-cache")
        if not (teacher.info.revision or teacher.info.weights_version):
            _log.warning(
                "teacher %s names no revision: answers kept from other weights under this name would be taken for its own",
                teacher.info.model,
            )

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """As the teacher's own, the known ones at once. The same question twice in one pass is asked once."""
        check_want(want, self.info)
        scoring: _Pass[Rollout, ScoredRollout] = _Pass(
            self, ScoringQuestions(self.info, want), lambda misses: self._teacher.score(misses, want)
        )
        async for scored in _closing(scoring.run(rollouts)):
            yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """As the teacher's own, the known ones at once; an answer is known for its prompt and sampling, the seed included."""
        check_sampling(sampling, self.info)
        writing: _Pass[Prompt, Completion] = _Pass(
            self, WritingQuestions(self.info, sampling), lambda misses: self._teacher.complete(misses, sampling)
        )
        async for completion in _closing(writing.run(prompts)):
            yield completion

    async def close(self) -> None:
        """Close the store; the teacher is not closed."""
        await self.in_thread(self._store.close)
        self._thread.shutdown(wait=True)

    async def in_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: call(*arguments))

    async def find_or_claim(self, key: bytes, name: str, tokens: int, takes_over: bool) -> bytes | Literal["mine", "theirs"]:
        def call() -> bytes | Literal["mine", "theirs"]:
            return self._store.find_or_claim(key, name, tokens, takes_over=takes_over)

        try:
            found = await self.in_thread(call)
        except StoreFullError as error:
            self._note_full(error)
            return "mine"
        finally:
            self.counters["corrupt"] = self._store.corrupt
        return found

    async def put(self, key: bytes, kind: str, data: bytes) -> None:
        try:
            await self.in_thread(self._store.put, key, self.info.model, kind, data)
        except StoreFullError as error:
            await self.give_up([key])
            self._note_full(error)

    async def drop(self, key: bytes) -> None:
        with suppress(StoreFullError):
            await self.in_thread(self._store.drop, key)

    async def give_up(self, keys: list[bytes]) -> None:
        with suppress(StoreFullError):
            await self.in_thread(self._store.give_up, keys)

    def _note_full(self, error: StoreFullError) -> None:
        if self._stops_when_full:
            raise StoreFullError(f"{error}; make room, or set teacher.cache.on_full=continue") from None
        if not self.counters["unstored"]:
            _log.warning("%s; going on without keeping answers", error)
        self.counters["unstored"] += 1


# ---------------------------------------------------------------- one pass


@dataclass(frozen=True, slots=True)
class _End:
    error: Exception | None


class _Pass(Generic[Item, Answer]):
    """One stream of items: the known ones are answered from the store, the others go to the teacher and into the store."""

    def __init__(
        self, cached: CachedTeacher, questions: Questions[Item, Answer], ask: Callable[[AsyncIterator[Item]], AsyncIterator[Answer]]
    ) -> None:
        self._cached = cached
        self._questions = questions
        self._ask = ask
        self._asked: dict[bytes, list[Item]] = {}  # key -> all items of this pass that wait for its answer
        self._ready: asyncio.Queue[Answer | _End] = asyncio.Queue(_READY)

    async def run(self, items: AsyncIterator[Item]) -> AsyncGenerator[Answer, None]:
        pump = asyncio.create_task(self._pump(items))
        try:
            while not isinstance(ready := await self._ready.get(), _End):
                yield ready
            if ready.error is not None:
                raise ready.error
        finally:
            pump.cancel()
            await asyncio.gather(pump, return_exceptions=True)
            if self._asked:
                await self._cached.give_up(list(self._asked))

    async def _pump(self, items: AsyncIterator[Item]) -> None:
        try:
            async for answer in _closing(self._ask(self._misses(items))):
                await self._take(answer)
            ended = _End(TeacherError(f"the teacher left {len(self._asked)} questions unanswered") if self._asked else None)
        except Exception as error:
            ended = _End(error)
        await self._ready.put(ended)

    async def _misses(self, items: AsyncIterator[Item]) -> AsyncGenerator[Item, None]:
        async for item in items:
            self._questions.check(item)
            key = self._questions.key(item)
            if key in self._asked:
                self._asked[key].append(item)
                continue
            self._asked[key] = [item]  # before it is claimed: a claim that is cancelled while it is made is given up too
            if await self._is_known(key, item):
                del self._asked[key]
                continue
            self._cached.counters["misses"] += 1
            yield item

    async def _is_known(self, key: bytes, item: Item) -> bool:
        """Hand over the answer where there is one, waiting for it where another process has just asked for it."""
        waited = 0.0
        name, tokens = self._questions.describe(item)
        while True:
            found = await self._cached.find_or_claim(key, name, tokens, waited >= _PATIENCE)
            if found == "mine":
                return False
            if found == "theirs":
                await asyncio.sleep(_POLL)
                waited += _POLL
                continue
            try:
                answer = self._questions.decode(item, found)
            except ValueError:
                await self._cached.drop(key)
                continue
            self._cached.counters["hits"] += 1
            await self._ready.put(answer)
            return True

    async def _take(self, answer: Answer) -> None:
        """Keep an answer before anyone sees it."""
        key = self._questions.key(self._questions.subject(answer))
        await self._cached.put(key, self._questions.kind, self._questions.encode(answer))
        waiting = self._asked.pop(key, ())
        self._cached.counters["hits"] += max(0, len(waiting) - 1)
        for item in waiting:
            await self._ready.put(self._questions.answer_to(item, answer))


async def _closing(source: AsyncIterator[Result]) -> AsyncGenerator[Result, None]:
    """Pass a stream on, and close what stands behind it where that can be closed."""
    try:
        async for item in source:
            yield item
    finally:
        close = getattr(source, "aclose", None)
        if close is not None:
            await close()
