"""The gate between sampling and the teacher: what it lets through costs teacher time, what it turns away is kept on record."""

from __future__ import annotations

from collections.abc import Mapping

from bbopd.data.filters import RolloutFilter
from bbopd.data.rejected import RejectedLog, Rejection
from bbopd.types import Rollout


class RolloutGate:
    """Applies the filters and writes rejected rollouts, with their reason, to ``log``. ``counts`` goes on from ``rejected``."""

    def __init__(self, rollout_filter: RolloutFilter, log: RejectedLog, rejected: Mapping[str, int]) -> None:
        self._filter = rollout_filter
        self._log = log
        self._counts = dict(rejected)

    def begin_cycle(self) -> None:
        self._filter.start_cycle()

    def accepts(self, rollout: Rollout) -> bool:
        """Decide on ``rollout``. Raises `RolloutsRejectedError` once too few of the last ones have passed."""
        rejection = self._filter.check(rollout)
        if rejection is not None:
            self.reject(rollout, rejection)
        self._filter.kept.count(rejection)
        return rejection is None

    def reject(self, rollout: Rollout, rejection: Rejection) -> None:
        """Count and keep a sequence that will not be trained on; not only the filters have reasons (bad_update, stale)."""
        self._counts[rejection.reason] = self._counts.get(rejection.reason, 0) + 1
        self._log.write(rollout, rejection)

    @property
    def counts(self) -> Mapping[str, int]:
        """Rejected sequences by reason, of the whole run."""
        return self._counts

    def close(self) -> None:
        self._log.close()
