"""The gate between sampling and the teacher: what it lets through costs teacher time, what it turns away is kept on record."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack

from bbopd.config import FiltersConfig
from bbopd.data.filters import RolloutFilter
from bbopd.data.near_duplicates import AcceptedAnswers
from bbopd.data.rejected import RejectedLog, Rejection
from bbopd.data.text_checks import TextCheck
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.state import RunState
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


def open_gate(
    filters: FiltersConfig,
    folder: RunFolder,
    state: RunState,
    stack: AsyncExitStack,
    *,
    checks: Sequence[TextCheck],
    stop_token_ids: Iterable[int],
    decode: Callable[[list[int]], str],
) -> RolloutGate:
    """The gate of a run at ``state``; what it writes to ``folder`` is closed with ``stack``. ``checks`` are of the answers' text."""
    log = stack.enter_context(RejectedLog(folder.rejected, decode, filters.quarantine_bytes))
    accepted = _accepted_answers(filters, folder, state, stack)
    judge = RolloutFilter(filters, stop_token_ids, decode=decode, text_checks=checks, accepted=accepted)
    return RolloutGate(judge, log, state.rejected)


def _accepted_answers(filters: FiltersConfig, folder: RunFolder, state: RunState, stack: AsyncExitStack) -> AcceptedAnswers | None:
    """Answers accepted before the checkpoint, where near-duplicates are turned away."""
    if filters.near_duplicates is None:
        return None
    folder.rewind("accepted.jsonl", state.step - 1, key="weights_version")
    pending = [entry["prompt_id"] for entry in state.pending if not entry["is_labelled"]]
    accepted = AcceptedAnswers(folder.root / "accepted.jsonl", filters.near_duplicates, filters.near_duplicates_kept, pending)
    stack.callback(accepted.close)
    return accepted
