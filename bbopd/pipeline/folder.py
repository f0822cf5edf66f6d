"""The folder of one run: what was asked, what happened, and what is needed to go on.

``run.json`` says what was run, on what; ``metrics.jsonl`` and ``evals.jsonl`` grow by a line; ``trace.json`` says what
this session did when; ``checkpoints/`` holds the state; ``summary.json`` is written when the run ends. Every whole-file write is atomic.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

from bbopd.config import RunConfig
from bbopd.errors import CheckpointError, ConfigError

_PACKAGES = (
    *("bbopd", "torch", "transformers", "tokenizers", "numpy", "grpcio", "protobuf", "safetensors", "pydantic"),
    *("lm_eval", "rouge_score", "sacrebleu"),
)

# What may differ when a run goes on from a checkpoint: where the teacher is, how often to save, and the remedies for a run that failed.
_MAY_CHANGE = (
    "output",
    "track",
    "cluster",
    "teacher.target",
    "teacher.serve",
    "teacher.plugin",
    "teacher.options",
    "teacher.tls",
    "teacher.token_file",
    "teacher.token_env",
    "teacher.timeout",
    "teacher.start_timeout",
    "teacher.inflight_tokens",
    "teacher.api",
    "teacher.prices",
    "teacher.budget",
    "teacher.cache",
    "teacher.max_replica_difference",
    "rollouts.engine",
    "rollouts.options",
    "rollouts.target",
    "rollouts.targets_file",
    "rollouts.tls",
    "rollouts.token_file",
    "rollouts.token_env",
    "rollouts.timeout",
    "rollouts.gpu_memory",
    "rollouts.sleep",
    "rollouts.agreement",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.checkpoint_store",
    "train.on_nonfinite",
    "train.on_spike",
    "train.spike_threshold",
    "train.spike_window",
    "train.bad_updates_in_a_row",
    "train.micro_batch_tokens",
    "train.lr",
    "train.clip",
    "objective.gad.discriminator_lr",
    "train.parallel",
    "data.filters",
    "data.long_prompts",
    "data.prompts.bad_rows",
    "data.rank",
    "data.world_size",
)


COPIED = ("run.json", "metrics.jsonl", "evals.jsonl", "rolled_back.jsonl", "rejected.jsonl", "accepted.jsonl", "samples.json")
"""What goes to a store beside a checkpoint."""
_OF_AN_ATTEMPT = (
    *("metrics.jsonl", "evals.jsonl", "rolled_back.jsonl", "rejected.jsonl", "accepted.jsonl"),
    *("samples.json", "summary.json", "trace.json"),
)


class RunFolder:
    """Paths of a run and its small files. `open` refuses a folder that belongs to another run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tensorboard"
        self.rejected = root / "rejected.jsonl"
        self.teacher_log = root / "teacher.log"

    @classmethod
    def open(
        cls, config: RunConfig, *, command: str, data_fingerprint: str = "", plugins: Sequence[Mapping[str, str]] = ()
    ) -> tuple[RunFolder, list[str]]:
        """Create the run's folder, or return to it; with it, what of the configuration has changed since, for a person to read.

        Before the first checkpoint everything may change, and the run begins anew. After it, only what decides where and how
        carefully a run goes on (`_MAY_CHANGE`), and the versions of ``plugins``. Raises `ConfigError` for any other difference, by its key,
        and for a finished run.
        """
        from bbopd.trainer.checkpoint import latest_checkpoint  # and torch, which whoever but looks into the folder does not need

        folder = cls(Path(config.output))
        known = folder.read_json("run.json")
        folder.refuse_finished()
        record = {
            "started": datetime.now().astimezone().isoformat(timespec="seconds"),
            "command": command,
            "config": config.model_dump(mode="json"),
            "data_sha256": data_fingerprint,
            "plugins": list(plugins),
            "machine": describe_machine(),
            "source": describe_source(),
        }
        if known is None:
            folder._begin(record)
            return folder, []
        changes = list(differences(known["config"], record["config"]))
        if latest_checkpoint(folder.checkpoints) is None:
            if changes or known["data_sha256"] != data_fingerprint:
                folder._begin(record)
            return folder, []
        for key, before, now in changes:
            if not key.startswith(_MAY_CHANGE):
                raise ConfigError(
                    f"{folder.root} holds an unfinished run with {key} = {before!r}, this one has {now!r}: "
                    "set output= to another folder, or go on with the same configuration"
                )
        if known["data_sha256"] != data_fingerprint:
            raise ConfigError(
                f"the data of the run in {folder.root} has changed since it began, so its order could not be kept: "
                "set output= to another folder, or bring the data back"
            )
        before_by_class = {one["class"]: one for one in known.get("plugins", ())}
        for one in plugins:
            before = before_by_class.get(one["class"], one)["version"]
            if before != one["version"]:
                changes.append((f"the version of {one['package']}, which brings {one['name']},", before, one["version"]))
        if changes:
            folder.write_json("run.json", {**known, "config": record["config"], "plugins": record["plugins"]})
        return folder, [f"{key} is now {now!r}, and was {before!r}" for key, before, now in changes]

    def _begin(self, record: Mapping[str, Any]) -> None:
        """Write what is run, and remove what an attempt that never reached a checkpoint has left."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            for name in _OF_AN_ATTEMPT:
                (self.root / name).unlink(missing_ok=True)
            shutil.rmtree(self.root / "best", ignore_errors=True)
        except OSError as error:
            raise ConfigError(f"cannot create the run's folder {self.root}: {error.strerror or error}; set output=") from error
        self.write_json("run.json", record)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process alone. Raises `ConfigError` where another run has it."""
        with (self.root / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise ConfigError(f"another process runs in {self.root}: wait for it, or set output= to another folder") from error
            yield

    def require(self) -> None:
        """Raises `CheckpointError` where the run's own files are gone from under it, so that nothing new is made in their place."""
        if not (self.root / "run.json").is_file():
            raise CheckpointError(
                f"the run's folder {self.root} was deleted or moved while it ran: what it had saved and measured is no longer there, and "
                "nothing is written beside it; put the folder back and give the same command again, or begin anew"
            )

    def refuse_finished(self) -> None:
        """Raises `ConfigError` where the folder holds a run that has ended."""
        if self.is_finished:
            raise ConfigError(f"{self.root} holds a finished run: set output= to another folder, or delete it")

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

    def write_json(self, name: str, content: Any, *, indent: int | None = 1) -> None:
        path = self.root / name
        temporary = path.with_suffix(".tmp")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                json.dump(content, file, indent=indent, ensure_ascii=False)
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

    def rewind(self, name: str, step: int, *, key: str = "step") -> None:
        """Drop lines whose ``key`` is past ``step``: they are of updates that the checkpoint does not hold, and will be made again."""
        self._keep(name, [line for line in self.read_lines(name) if line[key] <= step])

    def keep_lines(self, name: str, count: int) -> None:
        """Drop all lines but the first ``count``."""
        self._keep(name, self.read_lines(name)[:count])

    def _keep(self, name: str, lines: Sequence[Mapping[str, Any]]) -> None:
        path = self.root / name
        temporary = path.with_suffix(".tmp")
        try:
            temporary.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
            temporary.replace(path)
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def append_to(self, name: str) -> JsonLines:
        return JsonLines(self.root / name)


class JsonLines:
    """A JSONL file that grows; each line is on disk, at least in the system's hands, before `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file: TextIO = path.open("a", encoding="utf-8")
        except OSError as error:
            raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(f"cannot write {self._path}: {error.strerror or error}") from error

    def close(self) -> None:
        with suppress(OSError):  # every line has been flushed, or its failure raised
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

    def answer(*words: str) -> str:
        try:
            done = subprocess.run([git, "-C", str(here), *words], capture_output=True, text=True, timeout=20, check=False)
        except subprocess.TimeoutExpired:
            return ""
        return done.stdout.strip()

    changed = answer("status", "--porcelain", "--untracked-files=no")
    return {"commit": answer("rev-parse", "HEAD"), "changed_files": len(changed.splitlines())}


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def differences(before: Any, now: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, value before, value now) for every key of two configurations, as JSON, that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *(name for name in now if name not in before)]:
            yield from differences(before.get(name), now.get(name), f"{key}.{name}" if key else name)
    elif _are_tables(before) and _are_tables(now) and len(before) == len(now):
        for old, new in zip(before, now, strict=True):
            yield from differences(old, new, key)
    elif before != now:
        yield key, before, now


def _are_tables(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)
