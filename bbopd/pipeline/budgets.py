"""When a phase of a run is over, and how long the run will be."""

from __future__ import annotations

from bbopd.config import RunConfig
from bbopd.pipeline.progress import Budget
from bbopd.pipeline.state import RunState


class Budgets:
    """What ``config`` allows, beside what ``state`` has spent."""

    def __init__(self, config: RunConfig, state: RunState) -> None:
        self._config, self._state = config, state

    def cold_start_is_over(self) -> bool:
        return self._state.cold_start_tokens >= self._config.train.cold_start_tokens or self.steps_are_spent()

    def steps_are_spent(self) -> bool:
        return self._config.train.total_steps is not None and self._state.step >= self._config.train.total_steps

    def is_spent(self, *, on_policy_tokens_under_way: int = 0) -> bool:
        """Whether the run is over, or will be once the rollouts under way are trained."""
        train, state = self._config.train, self._state
        if self.steps_are_spent():
            return True
        if self._config.writes_rollouts:
            return state.on_policy_tokens + on_policy_tokens_under_way >= train.on_policy_tokens
        return train.labelled_tokens is not None and state.labelled_tokens >= train.labelled_tokens

    def rollouts_of_cycle(self) -> int:
        """How many of the next cycle's sequences the student writes."""
        return self._config.rollouts_at(self._state.on_policy_tokens / max(1, self._config.train.on_policy_tokens))

    def projected_steps(self) -> int:
        """Length of the run for the schedules: what was planned, or more where answers turn out shorter than they may be."""
        planned, train, state = self._config.planned_steps, self._config.train, self._state
        if not state.on_policy_tokens:
            return planned
        steps_per_token = (state.step - state.cold_start_steps) / state.on_policy_tokens
        projected = round(state.cold_start_steps + train.on_policy_tokens * steps_per_token)
        return max(planned, min(projected, train.total_steps or projected))

    def progress(self, phase: str, elapsed: float) -> Budget:
        train, state = self._config.train, self._state
        done, total = {
            "cold_start": (state.cold_start_tokens, train.cold_start_tokens),
            "on_policy": (state.on_policy_tokens, train.on_policy_tokens),
            "labelled": (state.labelled_tokens, train.labelled_tokens or 0),
        }[phase]
        return Budget(phase, done, total, state.step, self._config.planned_steps, elapsed)
