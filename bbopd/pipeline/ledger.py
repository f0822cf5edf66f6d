"""Which update cycle it is where cycles overlap, who may begin, and who must be trained before it ends.

A cycle is over once as many sequences are done with (trained or rejected) as one draws, and none is left that would be too old for the
next one.
"""

from __future__ import annotations

from collections import Counter

from bbopd.types import Rollout


class Ledger:
    """Cycles of one stretch of the pipeline, numbered from 0, as are its groups: the sequences that are drawn together.

    Parameters
    ----------
    per_cycle : sequences in a group.
    max_staleness : cycles that may begin between the push of weights and the training on what they wrote.
    """

    def __init__(self, *, per_cycle: int, max_staleness: int) -> None:
        self.cycle = 0
        """Under way, or about to begin."""
        self._per_cycle, self._max_staleness = per_cycle, max_staleness
        self._done = 0
        self._pushed = 0  # cycle of the last push
        self._cycle_of_version: dict[int, int] = {}
        self._open: dict[int, tuple[int, int | None]] = {}  # sequence -> group, and the last cycle that may train it
        self._due: Counter[int] = Counter()  # cycle -> open sequences for which it is the last

    @property
    def open(self) -> int:
        """Sequences begun and not done with."""
        return len(self._open)

    def may_begin(self, group: int) -> bool:
        """Whether sequences written with the weights of now can still be trained in time if all groups before them go first."""
        return group - self.cycle <= self._max_staleness

    def push(self, version: int) -> None:
        """The engine's weights are the trainer's of now, called ``version``."""
        self._cycle_of_version[version] = self._pushed = self.cycle

    def begin(self, group: int, rollouts: range, labelled: range) -> None:
        """These sequences are drawn; the rollouts are written with the weights that were pushed last."""
        last = self._pushed + self._max_staleness
        self._open.update(dict.fromkeys(rollouts, (group, last)) | dict.fromkeys(labelled, (group, None)))
        self._due[last] += len(rollouts)

    def staleness(self, rollout: Rollout) -> int | None:
        """Cycles since the weights that wrote it were pushed; None where the engine names weights that never were."""
        pushed = self._cycle_of_version.get(rollout.weights_version)
        return None if pushed is None else self.cycle - pushed

    def is_stale(self, rollout: Rollout) -> bool:
        """Whether it must not be trained on in this cycle."""
        staleness = self.staleness(rollout)
        return not rollout.is_labelled and (staleness is None or staleness > self._max_staleness)

    def is_straggler(self, number: int) -> bool:
        """Whether the cycle it was drawn for has gone on without it."""
        return self._open[number][0] < self.cycle

    def finish(self, number: int) -> None:
        """It is trained, or rejected."""
        _, last = self._open.pop(number)
        self._done += 1
        if last is not None:
            self._due[last] -= 1
        while self._done >= (self.cycle + 1) * self._per_cycle and not self._due[self.cycle]:
            self.cycle += 1
