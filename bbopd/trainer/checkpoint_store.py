"""Copies of a run's checkpoints in an object store, by fsspec: a machine whose folder is empty goes on from them.

Below the store's address everything is as in the run's folder of checkpoints (`checkpoint`), and in each checkpoint ``run/`` has the small
files of the run beside it. A checkpoint's manifest is copied after all else of it, and ``latest`` after that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

from bbopd.errors import CheckpointError, ConfigError
from bbopd.trainer.checkpoint_files import LATEST, MANIFEST, adopt_checkpoint, aside_of, explained, in_order, verify_checkpoint

_RUN = "run"


class CheckpointStore:
    """That at ``url``. Whatever a library of the store raises, an upload that fails is told by `end`, and leaves ``latest`` as it was."""

    def __init__(self, url: str, keep: int) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(f"train.checkpoint_store {url} cannot be reached: {error}") from error
        self._url, self._keep = url, keep
        self._uploader = ThreadPoolExecutor(1, thread_name_prefix="bbopd-store")
        self._uploading: Future[None] | None = None

    # ------------------------------------------------------------ there

    def begin(self, checkpoint: Path, beside: Iterable[Path]) -> None:
        """Copy a whole checkpoint, with files of the run ``beside`` it, while training goes on; `end` the one before first."""
        assert self._uploading is None, "one at a time"
        self._uploading = self._uploader.submit(self._upload, checkpoint, [path for path in beside if path.is_file()])

    def end(self) -> CheckpointError | None:
        """Wait for what is being copied; why it could not be, or None."""
        uploading, self._uploading = self._uploading, None
        error = None if uploading is None else uploading.exception()
        if error is None:
            return None
        return CheckpointError(
            f"the checkpoint could not be copied to train.checkpoint_store {self._url} ({type(error).__name__}: {error}): those in the "
            "run's folder are whole, and what the store calls the latest is what it was; look at its credentials and space"
        )

    def _upload(self, checkpoint: Path, beside: list[Path]) -> None:
        place = f"{self._root}/{checkpoint.name}"
        files = [path for path in sorted(checkpoint.rglob("*")) if path.is_file() and path.name != MANIFEST]
        targets = {path: f"{place}/{path.relative_to(checkpoint).as_posix()}" for path in files}
        targets |= {path: f"{place}/{_RUN}/{path.name}" for path in beside}
        for path, target in (*targets.items(), (checkpoint / MANIFEST, f"{place}/{MANIFEST}")):
            self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
            self._files.put_file(str(path), target)
        self._files.pipe_file(f"{self._root}/{LATEST}", f"{checkpoint.name}\n".encode())
        self._retire(checkpoint.name)

    def _retire(self, newest: str) -> None:
        """Remove all but the newest, and whatever an upload that was cut off has left."""
        names = self._names()
        others = [name for name in names if name != newest and self._is_whole(name)]
        kept = {newest, *others[len(others) + 1 - self._keep :]} if self._keep > 1 else {newest}
        for name in names:
            if name not in kept:
                if self._is_whole(name):
                    self._files.rm_file(f"{self._root}/{name}/{MANIFEST}")  # a removal cut short must not look like a checkpoint
                self._files.rm(f"{self._root}/{name}", recursive=True)

    # ------------------------------------------------------------ and back

    def fetch(self, folder: Path) -> str | None:
        """Bring the latest checkpoint, and the files beside it, into a run's ``folder``; its name, or None where the store has none.

        Raises `CheckpointError` where it cannot be read, or is not what was copied there.
        """
        try:
            name = self._latest()
            return None if name is None else self._download(name, folder)
        except CheckpointError:
            raise
        except Exception as error:  # whatever the store's library raises
            raise CheckpointError(
                f"train.checkpoint_store {self._url} cannot be read ({type(error).__name__}: {error}): look at its credentials, or leave "
                "it out to begin anew"
            ) from error

    def _download(self, name: str, folder: Path) -> str:
        checkpoint, place = folder / "checkpoints" / name, f"{self._root}/{name}"
        aside = aside_of(checkpoint)
        manifest = self._files.cat_file(f"{place}/{MANIFEST}")
        with explained(folder, aside):
            for file in (*json.loads(manifest)["files"], MANIFEST):
                (aside / file).parent.mkdir(parents=True, exist_ok=True)
                self._files.get_file(f"{place}/{file}", str(aside / file))
            verify_checkpoint(aside)
            for found in self._files.ls(f"{place}/{_RUN}", detail=False) if self._files.exists(f"{place}/{_RUN}") else ():
                self._files.get_file(found, str(folder / found.rpartition("/")[2]))
            adopt_checkpoint(checkpoint, aside)
        return name

    def _latest(self) -> str | None:
        pointer = f"{self._root}/{LATEST}"
        named = self._files.cat_file(pointer).decode(errors="replace").strip() if self._files.exists(pointer) else ""
        names = self._names()
        if named in names and self._is_whole(named):
            return str(named)
        return next((name for name in reversed(names) if self._is_whole(name)), None)

    def _names(self) -> list[str]:
        """Of checkpoints, whole or not, oldest first."""
        if not self._files.exists(self._root):
            return []
        self._files.invalidate_cache()
        found = {Path(path).name for path in self._files.ls(self._root, detail=False)}
        return sorted((name for name in found if name.startswith("step-")), key=in_order)

    def _is_whole(self, name: str) -> bool:
        return bool(self._files.exists(f"{self._root}/{name}/{MANIFEST}"))
