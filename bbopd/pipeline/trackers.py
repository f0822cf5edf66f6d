"""Where a run's figures go besides its folder: TensorBoard always, and the experiment trackers that ``track`` names.

Each library is set up as it always is, by its own environment variables (WANDB_MODE, MLFLOW_TRACKING_URI, TRACKIO_SERVER_URL …).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from bbopd.errors import ConfigError
from bbopd.extras import need
from bbopd.plugins import PluginUse

PROJECT = "bbopd"
_MLFLOW_CHARACTERS = 6000  # of a parameter's value


@dataclass(frozen=True, slots=True)
class TrackedRun:
    """What a tracker is told at the start. ``identity`` is the same when the run goes on, and no other run's."""

    name: str
    identity: str
    settings: Mapping[str, Any]  # by dotted key
    folder: Path


class Tracker(Protocol):
    """Takes the figures of one run as they come. Any method may raise: the run goes on without it."""

    def log(self, figures: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run's folder; those of steps after ``from_step`` are hidden, as they are made again."""

    def __init__(self, folder: Path, *, from_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._board = SummaryWriter(str(folder), purge_step=from_step + 1)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    def __init__(self, run: TrackedRun) -> None:
        wandb = need("wandb", "track", extra="wandb")
        self._run = wandb.init(
            project=PROJECT, name=run.name, id=run.identity, resume="allow", config=dict(run.settings), dir=str(run.folder)
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class Trackio:
    def __init__(self, run: TrackedRun) -> None:
        trackio = need("trackio", "track", extra="trackio")
        self._run = trackio.init(
            project=PROJECT, name=f"{run.name}-{run.identity[:6]}", config=dict(run.settings), resume="allow", embed=False
        )

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """Logs from a thread of MLflow's own, so that a slow server does not hold the run up."""

    def __init__(self, run: TrackedRun) -> None:
        self._client = need("mlflow", "track", extra="mlflow").MlflowClient()
        entities = need("mlflow.entities", "track", extra="mlflow")
        self._metric, parameter = entities.Metric, entities.Param
        experiment = self._client.get_experiment_by_name(PROJECT)
        number = self._client.create_experiment(PROJECT) if experiment is None else experiment.experiment_id
        known = self._client.search_runs([number], f"tags.`bbopd.identity` = '{run.identity}'", max_results=1)
        if known:
            self._run_id = known[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            self._run_id = self._client.create_run(number, run_name=run.name, tags={"bbopd.identity": run.identity}).info.run_id
            settings = [parameter(key, str(value)[:_MLFLOW_CHARACTERS]) for key, value in run.settings.items()]
            for start in range(0, len(settings), 100):  # as many as one request takes
                self._client.log_batch(self._run_id, params=settings[start : start + 100])
        self._pending: Any = None

    def log(self, figures: Mapping[str, float], step: int) -> None:
        import time

        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, value in figures.items()]
        self._pending = self._client.log_batch(self._run_id, metrics=metrics, synchronous=False)

    def close(self) -> None:
        if self._pending is not None:
            self._pending.wait()
        self._client.set_terminated(self._run_id)


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": WeightsAndBiases, "trackio": Trackio, "mlflow": MLflow}


def require_trackers(names: Sequence[str]) -> None:
    """Raises `ConfigError`, with the command that installs it, for a tracker that is not there: before anything is loaded."""
    for name in names:
        if name in TRACKERS:
            need(name, "track", extra=name)


def open_trackers(names: Sequence[str], run: TrackedRun, plugins: Sequence[PluginUse] = ()) -> list[tuple[str, Tracker]]:
    """The trackers that ``track`` names, of which some are ``plugins``.

    Raises `ConfigError` for one that does not start; those before it are closed.
    """
    brought = {use.name: use for use in plugins if use.group == "trackers"}
    opened: list[tuple[str, Tracker]] = []
    for name in names:
        try:
            opened.append((name, brought[name].make(run) if name in brought else TRACKERS[name](run)))
        except Exception as error:  # whatever its library raises
            for _, tracker in opened:
                with suppress(Exception):
                    tracker.close()
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(
                f"track: {name} does not start ({type(error).__name__}: {error}): set it up, or leave it out of track; what the run "
                "writes to its folder has all figures"
            ) from error
    return opened


def tracked_run(folder: Path, started: str, config: Mapping[str, Any]) -> TrackedRun:
    """How a run is called elsewhere: by its folder, and by when it began, so that a new run in an old folder is another one."""
    identity = sha256(f"{folder.resolve()} {started}".encode()).hexdigest()[:16]
    return TrackedRun(folder.resolve().name, identity, dict(_flat(config)), folder)


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            pairs += _flat(value, f"{prefix}{key}.")
        else:
            pairs.append((f"{prefix}{key}", json.dumps(value) if isinstance(value, list | tuple) else value))
    return pairs
