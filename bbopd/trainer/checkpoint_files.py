"""The folders of checkpoints: how one appears whole or not at all, is retired, and is proved whole before it is trusted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from bbopd.errors import CheckpointError
from bbopd.trainer.write_points import reached

MANIFEST = "manifest.json"
LATEST = "latest"
SHARDS = "shards"
"""The folder of weights and moments in a checkpoint that several ranks have written."""
_ASIDE = ".tmp-"  # being written, or being removed: never a checkpoint
_CHUNK_BYTES = 2**22


def begin_checkpoint(root: Path, step: int, needed: int) -> tuple[Path, Path]:
    """The folder that a checkpoint of ``step`` shall have below ``root``, and the empty one, aside, in which to write it.

    A step saved twice gets a folder of its own each time. Raises `CheckpointError` where the disk has less than ``needed`` bytes.
    """
    with explained(root):
        _make(root)
        _remove_leftovers(root)
        if (free := shutil.disk_usage(root).free) < needed:
            raise CheckpointError(
                f"{root} has {free:,} bytes free and a checkpoint needs {needed:,}: free some space; earlier checkpoints are whole"
            )
        folder = _free_name(root, step)
        aside = aside_of(folder)
        aside.mkdir()
    reached("begun")
    return folder, aside


def publish_checkpoint(folder: Path, aside: Path, step: int, keep: int) -> None:
    """Make what was written ``aside`` the checkpoint ``folder``: a manifest, all of it synced, renamed, named by ``latest``.

    Then drop all but the newest ``keep``. Raises `CheckpointError`; what is aside is then gone, earlier checkpoints are as they were.
    """
    root = folder.parent
    with explained(root, aside):
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        manifest = {path.relative_to(aside).as_posix(): {"bytes": path.stat().st_size, "crc32": _crc32(path)} for path in files}
        (aside / MANIFEST).write_text(json.dumps({"step": step, "files": manifest}, indent=1))
        reached("manifest")
        adopt_checkpoint(folder, aside)
    _retire(root, folder, keep)


def adopt_checkpoint(folder: Path, aside: Path) -> None:
    """Make what is ``aside``, manifest and all, the checkpoint ``folder`` and the latest: synced, renamed, named. Raises OSError."""
    for path in (*sorted(aside.rglob("*")), aside):
        _sync(path)
    reached("synced")
    aside.rename(folder)
    _sync(folder.parent)
    reached("renamed")
    _point(folder.parent, folder)


def aside_of(folder: Path) -> Path:
    """Where the checkpoint ``folder`` is before it is one."""
    return folder.with_name(f"{_ASIDE}{folder.name}")


# ---------------------------------------------------------------- folders


def checkpoint_folders(root: Path) -> list[Path]:
    """Oldest first: by step, then by the count of saves of that step."""
    return sorted((path for path in root.glob("step-*") if path.is_dir()), key=lambda path: in_order(path.name))


def in_order(name: str) -> tuple[str, int]:
    """By what checkpoints' names are sorted."""
    step, _, save = name.partition(".")
    return step, int(save or 1)


def _free_name(root: Path, step: int) -> Path:
    first = root / f"step-{step:08d}"
    taken = [path for path in checkpoint_folders(root) if path.stem == first.name]
    return root / f"{first.name}.{int(taken[-1].suffix[1:] or 1) + 1}" if taken else first


def _point(root: Path, folder: Path) -> None:
    pointer = root / f"{_ASIDE}{LATEST}"
    pointer.write_text(folder.name + "\n")
    _sync(pointer)
    reached("pointer")
    pointer.replace(root / LATEST)
    _sync(root)
    reached("latest")


def _retire(root: Path, newest: Path, keep: int) -> None:
    others = [path for path in checkpoint_folders(root) if path != newest]
    for path in others[: max(0, len(others) + 1 - keep)]:
        aside = aside_of(path)
        try:
            path.rename(aside)  # a removal cut short must not look like a checkpoint
        except OSError as error:
            raise CheckpointError(f"{newest} is whole, but the old {path} cannot be removed ({error}): remove it by hand") from error
        reached("old one set aside")
        shutil.rmtree(aside, ignore_errors=True)
        reached("old one removed")


def _make(root: Path) -> None:
    """With every folder above it that is missing, so that a loss of power takes none of them away."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _sync(path.parent)


def _remove_leftovers(root: Path) -> None:
    for path in root.glob(f"{_ASIDE}*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def explained(root: Path, aside: Path | None = None) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        hint = "the disk is full: free some space" if full else "check the disk and the permissions"
        raise CheckpointError(
            f"the checkpoint could not be written below {root} ({error}): {hint}; earlier checkpoints are whole"
        ) from error


# ---------------------------------------------------------------- integrity


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            value = zlib.crc32(chunk, value)
    return value


def verify_checkpoint(folder: Path) -> None:
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is missing or damaged ({error}); {way_out(folder)}") from error
    for name, entry in files.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise CheckpointError(f"{path} is missing; {way_out(folder)}")
        if size != entry["bytes"]:
            raise CheckpointError(f"{path} has {size:,} bytes instead of {entry['bytes']:,}: it was cut short; {way_out(folder)}")
        try:
            found = _crc32(path)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror}); {way_out(folder)}") from error
        if found != entry["crc32"]:
            raise CheckpointError(f"{path} was altered after it was written (CRC-32 differs); {way_out(folder)}")


def way_out(folder: Path) -> str:
    earlier = [path for path in checkpoint_folders(folder.parent) if path != folder and (path / MANIFEST).is_file()]
    if not earlier:
        return f"there is no other checkpoint in {folder.parent}: start again with another output folder"
    return f"remove {folder} to resume from {earlier[-1]}"
