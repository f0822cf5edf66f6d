"""A teacher across gRPC: rollouts stream out, signals stream in, over one replica or several, and every failure is a named one."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

from bbopd.errors import TeacherError
from bbopd.rpc.security import ClientAccess
from bbopd.teachers.backoff import RetryBudget
from bbopd.teachers.completions import CompletionSession
from bbopd.teachers.endpoint import Endpoint, common_info, connect_endpoints
from bbopd.teachers.replicas import largest_difference
from bbopd.teachers.score_session import ScoreSession
from bbopd.types import Completion, Prompt, Rollout, Sampling, ScoredRollout, SignalSpec, TeacherSignal

__all__ = ["RemoteTeacher"]


class RemoteTeacher:
    """The `Teacher` protocol over one or more replicas of a ``bbopd.v1.TeacherService``; made by `connect`."""

    def __init__(
        self, endpoints: Sequence[Endpoint], *, timeout: float, inflight_tokens: int, is_alive: Callable[[], bool] | None = None
    ) -> None:
        self.info = common_info([endpoint.info for endpoint in endpoints])
        self.target = ", ".join(endpoint.target for endpoint in endpoints)
        self.counters: Counter[str] = Counter(retries=0, bad_answers=0, reconnects=0, moved=0, asked_again=0)
        """How often an item was asked again, an answer failed validation, a stream was opened again, an item went to another replica."""
        self._endpoints = endpoints
        self._timeout = timeout
        self._inflight_tokens = inflight_tokens
        self._is_alive = is_alive
        self._budget = RetryBudget()

    @classmethod
    async def connect(
        cls,
        target: str | Sequence[str],
        *,
        access: ClientAccess | None = None,
        timeout: float = 300.0,
        inflight_tokens: int = 8192,
        connect_timeout: float = 10.0,
        is_alive: Callable[[], bool] | None = None,
    ) -> RemoteTeacher:
        """Connect, and ask every replica who it is.

        Parameters
        ----------
        target : ``grpc://host:port``, beyond this machine only with TLS; or several, which must be replicas of one teacher.
        access : TLS and token; None is plain text.
        timeout : seconds without any answer, while some are due, before the teacher counts as gone.
        inflight_tokens : tokens of rollouts sent to one replica and not yet answered, prompts included.
        connect_timeout : seconds to go on trying to reach them.
        is_alive : tells that the teacher's process still runs, where that is known: one that has ended is not waited for.

        Raises
        ------
        ConfigError : a target that is no such address, or needs TLS.
        TeacherError : one cannot be reached, speaks another protocol, is no teacher, or two are not the same one.
        """
        targets = [target] if isinstance(target, str) else list(target)
        endpoints = await connect_endpoints(targets, connect_timeout, access)
        return cls(endpoints, timeout=timeout, inflight_tokens=inflight_tokens, is_alive=is_alive)

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]:
        """Scores as each is ready, in any order; rollouts are taken from the source only as fast as the teacher answers.

        Items that fail for a while, or arrive damaged, are asked again up to 3 times, by another replica where there is one; a broken
        stream is opened again. Rows that have arrived are not asked for again.

        Items are sent in the order of the source. A teacher's answer may depend, in its last bits, on what shares its batch; the
        same rollouts get the same answers again where there is one replica, with no other client, and all of them, prompts included,
        are within ``inflight_tokens`` (and the teacher's own ``max_request_tokens``): beyond that, what is sent when, and where,
        depends on how fast answers come.

        Raises
        ------
        TeacherError : not offered, refused, another teacher than before, or none that answered for ``timeout``; it names what was
            finished.
        """
        async with aclosing(self._session(self._endpoints, want).run(rollouts)) as answers:
            async for scored in answers:
                yield scored

    async def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]:
        """The teacher's own answers, as each is ready, in any order. Raises `TeacherError` as `score` does."""
        session = CompletionSession(
            self._endpoints, self.info, sampling, timeout=self._timeout, counters=self.counters, budget=self._budget
        )
        async with aclosing(session.run(prompts)) as answers:
            async for completion in answers:
                yield completion

    async def compare_replicas(self, rollouts: Sequence[Rollout], want: SignalSpec, *, limit: float, rounds: int = 3) -> float:
        """Let every replica score the same rollouts, ``rounds`` times at once, and see how far their answers lie apart.

        Returns
        -------
        float : the largest total variation distance at any token, in 0..1 (see `replicas`).

        Raises
        ------
        TeacherError : it is above ``limit``; or as for `score`.
        """
        passes = [self._score_all(endpoint, rollouts, want) for endpoint in self._endpoints for _ in range(rounds)]
        outcomes = await asyncio.gather(*passes)
        largest, worst = 0.0, (self._endpoints[0], rollouts[0])
        for rollout in rollouts:
            for number, outcome in enumerate(outcomes):
                apart = largest_difference([outcomes[0][rollout.rollout_id], outcome[rollout.rollout_id]])
                if apart > largest:
                    largest, worst = apart, (self._endpoints[number // rounds], rollout)
        if largest > limit:
            first, other = self._endpoints[0].target, worst[0].target
            raise TeacherError(
                f"replicas of {self.info.model} differ: {largest:.3g} of the probability of one token of {worst[1].rollout_id} lies "
                f"elsewhere at {other} than at {first}, teacher.max_replica_difference is {limit:g}; "
                "serve the same weights in the same dtype on the same kind of device, or raise the limit"
            )
        return largest

    async def close(self) -> None:
        """Close the connections; calls still open are cancelled."""
        for endpoint in self._endpoints:
            await endpoint.close()

    def _session(self, endpoints: Sequence[Endpoint], want: SignalSpec, *, may_replay: bool = True) -> ScoreSession:
        return ScoreSession(
            endpoints,
            self.info,
            want,
            timeout=self._timeout,
            inflight_tokens=self._inflight_tokens,
            counters=self.counters,
            budget=self._budget,
            is_alive=self._is_alive,
            may_replay=may_replay,
        )

    async def _score_all(self, endpoint: Endpoint, rollouts: Sequence[Rollout], want: SignalSpec) -> dict[str, TeacherSignal]:
        async def source() -> AsyncIterator[Rollout]:
            for rollout in rollouts:
                yield rollout

        async with aclosing(self._session([endpoint], want, may_replay=False).run(source())) as answers:
            return {scored.rollout.rollout_id: scored.signal async for scored in answers}
