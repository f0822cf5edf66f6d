"""The back edge: the trainer's weights into the engine, and whether both then mean the same by them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from torch import Tensor

from bbopd.data.streams import each
from bbopd.pipeline.parts import Parts, to_the_end
from bbopd.pipeline.timing import Timeline
from bbopd.types import Prompt, Rollout, Sampling

_PROBES = 8  # short answers by which an engine is checked right after a push


class Weights:
    """Pushes ``parts.trainer``'s weights into ``parts.engine`` and knows which it has; ``figures`` of it are for metrics.jsonl."""

    def __init__(self, parts: Parts, timeline: Timeline) -> None:
        self._parts, self._timeline = parts, timeline
        self._pushed: int | None = None
        self._pushed_at: float | None = None
        self._probed: int | None = None
        self._is_asleep = False
        self.figures: dict[str, float] = {}

    async def push(self, version: int) -> None:
        """Give the engine the weights as they are now, unless it has them: all of them the first time, then what may have changed.

        One that sleeps is given them in any case, and awake.

        ``push_share`` is its part of the time since the push before it ended, what was trained between them included.

        A push that has begun is finished even where this task is cancelled: an engine with half of it would be of no more use.
        """
        if self._pushed == version and not self._is_asleep:
            return
        with self._timeline.activity("sampling", is_behind=self._parts.overlaps, span="push of weights", version=version):
            started = self._timeline.clock()
            _, cancelled = await to_the_end(self._parts.engine.load_weights(self._changed(), version))
            ended = self._timeline.clock()
        self.figures["push_seconds"] = round(ended - started, 4)
        if self._pushed_at is not None and ended > self._pushed_at:
            self.figures["push_share"] = round((ended - started) / (ended - self._pushed_at), 6)
        self._pushed_at = ended
        self._pushed, self._is_asleep = version, False
        if cancelled is not None:
            raise cancelled

    def forget(self) -> None:
        """The trainer has other weights than before, of a version that the engine may have had: the next push gives it all of them."""
        self._pushed = self._probed = None

    async def sleep(self) -> None:
        """Have the engine give its memory to the trainer until the next push, where it is one that does. Harmless while it sleeps."""
        if self._parts.sleep is None or self._is_asleep:
            return
        with self._timeline.activity("sampling", span="to sleep"):
            _, cancelled = await to_the_end(self._parts.sleep())
        self._is_asleep = True
        if cancelled is not None:
            raise cancelled

    def _changed(self) -> Iterable[tuple[str, Tensor]]:
        if self._parts.shares_weights:
            return ()
        return self._parts.trainer.weights(changed_only=self._pushed is not None)

    async def probe(self, prompts: Sequence[Prompt], sampling: Sampling, *, tokens: int) -> list[Rollout]:
        """The beginnings of answers to a few ``prompts``, ``tokens`` in all, for `check`; none where these weights have been probed.

        They are no draws, and nobody trains on them.
        """
        if self._parts.agreement is None or self._probed == self._pushed:
            return []
        self._probed = self._pushed
        asked = prompts[:_PROBES]
        short = replace(sampling, max_new_tokens=max(1, min(sampling.max_new_tokens, -(-tokens // len(asked)))))
        with self._timeline.activity("sampling", is_behind=True, span="probe"):
            return [rollout async for rollout in self._parts.engine.generate(each(asked), short)]

    async def check(self, rollouts: Sequence[Rollout]) -> None:
        """Hold what the engine wrote to the trainer's weights, which must still be those pushed last. Raises `EngineError`."""
        if self._parts.agreement is None or not rollouts:
            return
        assert self._pushed is not None, "a push comes first"
        found, cancelled = await to_the_end(self._parts.run_blocking(self._parts.agreement, rollouts, self._pushed))
        self.figures |= found
        if cancelled is not None:
            raise cancelled
