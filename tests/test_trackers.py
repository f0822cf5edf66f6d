"""Figures reach every tracker, none can stop a run, and the real libraries, where they are installed, hold what they were told."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bbopd.config import RunConfig
from bbopd.config_file import parse_config
from bbopd.errors import ConfigError
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.trackers import TRACKERS, TrackedRun, open_trackers, require_trackers, tracked_run

SETTINGS = {"train": {"lr": 1e-3, "betas": (0.9, 0.999)}, "output": "runs/x"}


class Notebook:
    """A tracker in memory, which breaks down at step ``breaks_at``."""

    def __init__(self, breaks_at: int | None = None) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.is_closed = False
        self._breaks_at = breaks_at

    def log(self, figures: Mapping[str, float], step: int) -> None:
        if step == self._breaks_at:
            raise RuntimeError("the server is gone")
        self.lines.append((step, dict(figures)))

    def close(self) -> None:
        self.is_closed = True


def a_run(folder: Path, steps: int = 3, **trackers: Any) -> list[str]:
    """A run's figures, written as a run does; what it noted."""
    notes: list[str] = []
    metrics = RunMetrics(RunFolder(folder), from_step=0, trackers=list(trackers.items()), note=notes.append)
    metrics.evaluation({"stage": "start", "step": 0, "bits_per_byte": 1.5, "kl_is_bucketed": False, "standard_errors": {"x": 1}})
    for step in range(1, steps + 1):
        metrics.step({"step": step, "phase": "on_policy", "loss": 1.0 / step, "reward": float("nan"), "tail": None})
    metrics.close()
    return notes


def test_every_tracker_hears_figures_and_a_broken_one_does_not_stop_the_rest(tmp_path: Path) -> None:
    good, bad = Notebook(), Notebook(breaks_at=2)
    notes = a_run(tmp_path, good=good, bad=bad)
    assert good.lines == [(0, {"eval/bits_per_byte": 1.5}), *((step, {"train/loss": 1.0 / step}) for step in (1, 2, 3))]
    assert good.is_closed
    assert bad.lines == good.lines[:2]
    assert not bad.is_closed
    assert notes == ["bad hears no more of this run (RuntimeError: the server is gone)"]
    assert len(RunFolder(tmp_path).read_lines("metrics.jsonl")) == 3
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert [(event.step, round(event.value, 4)) for event in board.Scalars("train/loss")] == [(1, 1.0), (2, 0.5), (3, 0.3333)]
    assert board.Tags()["scalars"] == ["eval/bits_per_byte", "train/loss"]


def test_tracker_that_does_not_start_is_told_before_anything_is_spent(tmp_path: Path) -> None:
    run = tracked_run(tmp_path, "2026-01-02", SETTINGS)
    first = Notebook()

    def broken(run: TrackedRun) -> Notebook:
        raise PermissionError("not logged in")

    TRACKERS.update(first=lambda run: first, broken=broken)
    try:
        with pytest.raises(ConfigError, match=r"track: broken does not start \(PermissionError: not logged in\)"):
            open_trackers(["first", "broken"], run)
        assert first.is_closed
        assert [name for name, _ in open_trackers(["first"], run)] == ["first"]
    finally:
        del TRACKERS["first"], TRACKERS["broken"]


def test_a_run_is_called_by_its_folder_and_its_beginning(tmp_path: Path) -> None:
    run = tracked_run(tmp_path / "x", "2026-01-02", SETTINGS)
    assert run.name == "x"
    assert run.settings == {"train.lr": 1e-3, "train.betas": "[0.9, 0.999]", "output": "runs/x"}
    assert run.identity == tracked_run(tmp_path / "x", "2026-01-02", {}).identity
    assert run.identity not in (tracked_run(tmp_path / "x", "2026-01-03", {}).identity, tracked_run(tmp_path, "2026-01-02", {}).identity)


def test_what_is_not_installed_is_said_with_its_remedy() -> None:
    missing = [name for name in TRACKERS if importlib.util.find_spec(name) is None]
    for name in missing:
        with pytest.raises(ConfigError, match=rf"track needs the package {name}: pip install 'bbopd\[{name}\]'"):
            require_trackers([name])


def test_names_in_a_config() -> None:
    config = {
        "student": {"model": "m"},
        "objective": {"name": "sft"},
        "rollouts": {"on_policy_fraction": 0},
        "train": {"labelled_tokens": 9},
    }
    assert parse_config(config, ["track=[mlflow, wandb]"], RunConfig, "a test").track == ("mlflow", "wandb")
    with pytest.raises(ConfigError, match="track"):
        parse_config(config, ["track=[wand]"], RunConfig, "a test")
    with pytest.raises(ConfigError, match="none of them twice"):
        parse_config(config, ["track=[mlflow, mlflow]"], RunConfig, "a test")


# A process of its own for each library, as they start threads and servers of their own, and warn of what they like.
_SESSION = """
import json, sys
from pathlib import Path
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.metrics import RunMetrics
from bbopd.pipeline.trackers import open_trackers, tracked_run

name, folder, first, last = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = tracked_run(folder, "2026-01-02", {"train": {"lr": 1e-3}})
metrics = RunMetrics(RunFolder(folder), from_step=first, trackers=open_trackers([name], run), note=lambda text: sys.exit(text))
for step in range(first + 1, last + 1):
    metrics.step({"step": step, "loss": 1.0 / step})
metrics.close()
"""
_READ = {
    "mlflow": """
import json, mlflow
client = mlflow.MlflowClient()
(run,) = client.search_runs([client.get_experiment_by_name("bbopd").experiment_id])
points = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, "train/loss"))
print(json.dumps({"points": points, "lr": float(run.data.params["train.lr"]), "status": run.info.status}))
""",
    "trackio": """
import json, trackio
from trackio.sqlite_storage import SQLiteStorage
(run,) = trackio.Api().runs("bbopd")
points = sorted((line["step"], line["train/loss"]) for line in SQLiteStorage.get_logs("bbopd", run.name))
print(json.dumps({"points": points, "lr": float(run.config["train.lr"]), "status": "finished"}))
""",
}


@pytest.mark.parametrize("name", ["mlflow", "trackio", "wandb"])
def test_real_library_holds_what_it_was_told_over_two_sessions(name: str, tmp_path: Path) -> None:
    for package in (name, "sqlalchemy") if name == "mlflow" else (name,):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    folder = tmp_path / "run-7"
    folder.mkdir()
    environment = os.environ | {
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }

    def python(code: str, *words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=250, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    python(_SESSION, name, str(folder), "0", "2")
    python(_SESSION, name, str(folder), "2", "4")
    if name == "wandb":
        kept = list(folder.glob("wandb/offline-run-*/run-*.wandb"))
        assert len(kept) == 2
        assert b"train/loss" in kept[0].read_bytes()
        assert len({path.stem for path in kept}) == 1, "both sessions are of one run"
        return
    held = json.loads(python(_READ[name]).splitlines()[-1])
    assert held["points"] == [[step, pytest.approx(1.0 / step)] for step in range(1, 5)]
    assert held["lr"] == 1e-3
    assert held["status"].lower() == "finished"
