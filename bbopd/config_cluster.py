"""What a run asks a Ray cluster for (``bbopd distill --ray``): processes, what each needs, and how often they are started again."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from bbopd.config_base import Positive, Section


class NeedsConfig(Section):
    """What one process is given."""

    cpus: Annotated[float, Field(gt=0)] = 1.0
    """Processors as Ray counts them; a process runs as many threads."""
    gpus: Annotated[int, Field(ge=0, le=1)] | None = None
    """None: 1 where the cluster has any, else 0."""


class ClusterConfig(Section):
    """Read by ``--ray`` alone."""

    ranks: Positive = 1
    """Processes that train the student together (``train.parallel`` says how)."""
    teachers: Positive = 1
    """Replicas of ``teacher.serve``, where the run has one."""
    engines: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)
    """Sample servers for ``rollouts.engine: vllm``: how many to begin with, and how many at most; one number is both. 0: vllm runs beside
    the first rank."""
    rank_needs: NeedsConfig = NeedsConfig()
    """What each rank is given."""
    teacher_needs: NeedsConfig = NeedsConfig()
    """What each teacher is given."""
    engine_needs: NeedsConfig = NeedsConfig()
    """What each engine is given."""
    max_restarts: Annotated[int, Field(ge=0)] = 10
    """Times that the ranks, and each server, are started again before the run is given up."""
    backoff: Annotated[float, Field(ge=0)] = 2.0
    """Seconds before the first restart; twice as many before each further one, up to 60."""
    wait: Annotated[float, Field(ge=0)] = 0.0
    """Seconds that nodes which the run needs may take to join; 0 refuses at once what the cluster has no room for."""
    grace: Annotated[float, Field(gt=0)] = 60.0
    """Seconds that processes have to save and end where the run is stopped, or its driver is gone, before they are killed."""

    @field_validator("engines", mode="before")
    @classmethod
    def _one_number_is_both(cls, value: Any) -> Any:
        return (value, value) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _engines_in_order(self) -> ClusterConfig:
        first, most = self.engines
        if first > most or (not first and most):
            raise ValueError(f"engines {first} to {most}: give how many to begin with, 1 or more, and then how many at most")
        return self
