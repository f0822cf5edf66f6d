"""Where a run stands, in plain numbers: the part of a checkpoint that is not tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from bbopd.errors import CheckpointError

_OF_THE_WEIGHTS = (
    *("step", "cold_start_steps", "cold_start_tokens", "labelled_tokens", "on_policy_tokens", "trained", "trained_tokens"),
    "recent",
)


@dataclass(slots=True)
class RunState:
    """Counters of one run, between two optimizer steps.

    Sequences are rollouts and labelled ones, each counted once however often it is begun: ``drawn`` = ``trained`` + those ``rejected`` +
    ``rolled_back`` + those ``pending``.
    """

    step: int = 0  # optimizer steps
    cold_start_steps: int = 0  # those of the cold start
    cycle: int = 0  # update cycles drawn, cold start included
    cold_start_tokens: int = 0  # labelled response tokens trained in the cold start
    labelled_tokens: int = 0  # labelled response tokens trained after it
    on_policy_tokens: int = 0  # response tokens of rollouts trained
    position: dict[str, Any] = field(default_factory=dict)  # of the prompt stream; empty before the first draw
    drawn: int = 0  # sequences
    trained: int = 0  # sequences
    rejected: dict[str, int] = field(default_factory=dict)  # sequences, by reason
    pending: list[dict[str, Any]] = field(default_factory=list)  # sequences drawn and not done with, as prompts to begin again
    rolled_back: int = 0  # sequences, trained in updates that were undone
    rolled_back_tokens: int = 0  # response tokens of these
    rolled_back_updates: int = 0
    bad_updates: dict[str, int] = field(default_factory=dict)  # that were not applied, by what was wrong
    skipped_tokens: int = 0  # response tokens of these
    bad_in_a_row: int = 0  # of these, since an update got further than those before
    bad_at: int = 0  # optimizer steps done when the last of them came, at most
    recent: list[list[float]] = field(default_factory=list)  # loss and gradient norm of the last updates of this phase
    sampled_tokens: int = 0
    scored_tokens: int = 0
    trained_tokens: int = 0
    teacher_retries: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # by activity; they add up to the run's own
    busy_seconds: dict[str, float] = field(default_factory=dict)  # by activity, each for itself

    def sequences(self) -> dict[str, int]:
        """What has become of every sequence drawn; pending ones are what is left, as nothing else may be."""
        rejected = sum(self.rejected.values())
        counts = {"drawn": self.drawn, "trained": self.trained, "rejected": rejected}
        if self.rolled_back:
            counts["rolled back"] = self.rolled_back
        return {**counts, "pending": self.drawn - self.trained - rejected - self.rolled_back}

    def bad_figures(self) -> dict[str, int]:
        """What a line of metrics.jsonl tells of updates that were not applied, or were undone, once there are any."""
        if not self.bad_updates:
            return {}
        return {
            "bad_updates": sum(self.bad_updates.values()),
            "skipped_tokens": self.skipped_tokens,
            "rolled_back_tokens": self.rolled_back_tokens,
        }

    def roll_back(self, to: RunState) -> None:
        """Be where the weights of ``to``, an earlier state of this run, were; what was drawn and spent since then stays drawn and spent."""
        self.rolled_back += self.trained - to.trained
        self.rolled_back_tokens += self.trained_tokens - to.trained_tokens
        self.rolled_back_updates += self.step - to.step
        for name in _OF_THE_WEIGHTS:
            setattr(self, name, getattr(to, name))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunState:
        """Raises `CheckpointError` where a counter is missing or unknown (another version wrote it)."""
        names = {item.name for item in fields(cls)}
        if set(data) != names:
            odd = sorted(set(data) ^ names)
            raise CheckpointError(
                f"the checkpoint's state has other counters than this version knows ({', '.join(odd)}): "
                "go on with the version that wrote it"
            )
        return cls(**data)
