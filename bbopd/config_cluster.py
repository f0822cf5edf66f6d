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


class ScaleConfig(Section):
    """When a run has more or fewer engines, between ``least`` and the second number of ``cluster.engines``."""

    least: Positive = 1
    """Engines that stay however little they have to do."""
    starved: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the time that the trainer waits for answers to be written, above which there are more; below half of it may be fewer."""
    busy: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Share of the time in which engines are to have something to write: fewer where those left would be no busier than that."""
    window: Annotated[float, Field(gt=0)] = 60.0
    """Seconds of the run that are looked at together; two such windows have to agree."""


class ClusterConfig(Section):
    """Read by ``--ray`` alone."""

    ranks: Positive = 1
    """Processes that train the student together (``train.parallel`` says how)."""
    teachers: Positive = 1
    """Replicas of ``teacher.serve``, where the run has one."""
    engines: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]] = (0, 0)
    """Sample servers for ``rollouts.engine: vllm``: how many to begin with, and how many at most; one number is both. 0: vllm runs beside
    the first rank."""
    scale: ScaleConfig | None = None
    """Whether the run changes the number of its engines by what it waits for; None: only ``bbopd cluster scale`` does."""
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
        if self.scale is not None and not self.scale.least <= first <= most > self.scale.least:
            raise ValueError(
                f"scale from {self.scale.least} engines on, with engines {first} to {most}: it needs cluster.engines=[first, most] with "
                "scale.least <= first, and most above scale.least"
            )
        return self
