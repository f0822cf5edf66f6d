"""The folder of one run: what was asked, what happened, and what is needed to go on.

``run.json`` says what was run, on what; ``metrics.jsonl`` and ``evals.jsonl`` grow by a line; ``checkpoints/`` holds the
state; ``summary.json`` is written when the run ends. Every whole-file write is atomic.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from bbopd.config import RunConfig
from bbopd.errors import CheckpointError, ConfigError

_PACKAGES = ("bbopd", "torch", "transformers", "numpy", "grpcio", "protobuf", "safetensors", "pydantic")


class RunFolder:
    """Paths of a run and its small files. `open` refuses a folder that belongs to another run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.rejected = root / "rejected.jsonl"
        self.teacher_log = root / "teacher.log"

    @classmethod
    def open(cls, config: RunConfig, *, command: str, data_fingerprint: str = "") -> RunFolder:
        """Create the run's folder, or return to it.

        Raises `ConfigError` where it holds a finished run, or one with another configuration (naming the first key that
        differs).
        """
        folder = cls(Path(config.output))
        wanted = config.model_dump(mode="json")
        known = folder.read_json("run.json")
        if known is None:
            try:
                folder.checkpoints.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot create the run's folder {folder.root}: {error.strerror or error}; set output=") from error
            folder.write_json(
                "run.json",
                {
                    "started": datetime.now().astimezone().isoformat(timespec="seconds"),
                    "command": command,
                    "config": wanted,
                    "data_sha256": data_fingerprint,
                    "machine": describe_machine(),
                    "source": describe_source(),
                },
            )
            return folder
        if folder.is_finished:
            raise ConfigError(f"{folder.root} holds a finished run: set output= to another folder, or delete it")
        difference = _first_difference(known["config"], wanted)
        if difference is not None:
            key, before, now = difference
            raise ConfigError(
                f"{folder.root} holds an unfinished run with {key} = {before!r}, this one has {now!r}: "
                "set output= to another folder, or go on with the same configuration"
            )
        if data_fingerprint and known.get("data_sha256") and known["data_sha256"] != data_fingerprint:
            raise ConfigError(
                f"the data of the run in {folder.root} has changed since it began: "
                "its order could not be kept; set output= to another folder"
            )
        return folder

    @property
    def is_finished(self) -> bool:
        summary = self.read_json("summary.json")
        return summary is not None and summary.get("status") == "finished"

    def read_json(self, name: str) -> Any:
        path = self.root / name
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot read {path}: {error}; delete the folder to start anew") from error

    def write_json(self, name: str, content: Any) -> None:
        path = self.root / name
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=1, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Lines of a JSONL file. A last line cut short by a kill is left out."""
        path = self.root / name
        if not path.exists():
            return []
        lines = []
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
        return lines

    def rewind(self, name: str, step: int) -> None:
        """Drop lines after ``step``: they are of updates that the checkpoint does not hold, and will be made again."""
        lines = [line for line in self.read_lines(name) if line["step"] <= step]
        temporary = (self.root / name).with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        temporary.replace(self.root / name)

    def append_to(self, name: str) -> JsonLines:
        return JsonLines(self.root / name)


class JsonLines:
    """A JSONL file that grows; each line is on disk, at least in the system's hands, before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        self._file.close()


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions: what a figure needs beside it."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"processor": _processor_name(), "cores": os.cpu_count(), "system": platform.platform(), "versions": versions}


def describe_source() -> dict[str, Any]:
    """The git state of the working tree that holds this package, where it is one."""
    git = shutil.which("git")
    here = Path(__file__).resolve().parents[2]
    if git is None or not (here / ".git").exists():
        return {}
    asked = {"commit": ["rev-parse", "HEAD"], "changed_files": ["status", "--porcelain", "--untracked-files=no"]}
    answers = {
        key: subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True, timeout=20, check=False).stdout.strip()
        for key, words in asked.items()
    }
    return {"commit": answers["commit"], "changed_files": len(answers["changed_files"].splitlines()), "argv": sys.argv}


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _first_difference(before: Any, now: Any, key: str = "") -> tuple[str, Any, Any] | None:
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            found = _first_difference(before.get(name), now.get(name), f"{key}.{name}" if key else name)
            if found is not None:
                return found
        return None
    return None if before == now else (key, before, now)
