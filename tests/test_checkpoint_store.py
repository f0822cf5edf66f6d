"""Checkpoints copied to a store by fsspec: whole or not there, however the copying ends, and gone on from by an empty folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from bbopd.config import TrainConfig
from bbopd.errors import CheckpointError, ConfigError
from bbopd.pipeline.checkpoints import open_store
from bbopd.trainer import latest_checkpoint
from bbopd.trainer.checkpoint_files import begin_checkpoint, publish_checkpoint, verify_checkpoint
from bbopd.trainer.checkpoint_store import CheckpointStore
from tests.loop_rig import Rig, run_config


class Breaking(LocalFileSystem):
    """Breaks off in the middle of its change number ``at``, and does nothing from then on, as if the process had been killed."""

    protocol = "breaking"
    cachable = False
    at = changes = 0

    def _change(self, rpath: str = "", content: bytes = b"") -> None:
        Breaking.changes += 1
        if Breaking.changes == Breaking.at and rpath:
            Path(self._strip_protocol(rpath)).write_bytes(content[: len(content) // 2])
        if Breaking.at and Breaking.changes >= Breaking.at:
            raise ConnectionError("broken off")

    def put_file(self, lpath: str, rpath: str, **options: Any) -> None:
        self._change(rpath, Path(lpath).read_bytes())
        super().put_file(lpath, rpath, **options)

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._change(path, value)
        super().pipe_file(path, value, **options)

    def rm_file(self, path: str) -> None:
        self._change()
        super().rm_file(path)

    def rm(self, path: str, **options: Any) -> None:
        self._change()
        super().rm(path, **options)


@pytest.fixture(autouse=True)
def _empty() -> None:
    fsspec.register_implementation("breaking", Breaking, clobber=True)
    Breaking.at = Breaking.changes = 0
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def make_checkpoint(root: Path, step: int) -> Path:
    folder, aside = begin_checkpoint(root / "checkpoints", step, 0)
    (aside / "model").mkdir()
    (aside / "model/weights").write_bytes(bytes([step]) * 1000)
    (aside / "state.json").write_text(json.dumps({"step": step}))
    publish_checkpoint(folder, aside, step, keep=9)
    return folder


def upload(store: CheckpointStore, root: Path, step: int) -> CheckpointError | None:
    root.mkdir(exist_ok=True)
    (root / "run.json").write_text(json.dumps({"at": step}))
    store.begin(make_checkpoint(root, step), [root / "run.json", root / "not there"])
    return store.end()


def assert_is(folder: Path, step: int) -> None:
    found = latest_checkpoint(folder / "checkpoints")
    assert found.name == f"step-{step:08d}"
    verify_checkpoint(found)
    assert (found / "model/weights").read_bytes() == bytes([step]) * 1000
    assert json.loads((folder / "run.json").read_text()) == {"at": step}


@pytest.mark.parametrize("kind", ["file", "memory", "dir"])
def test_what_was_copied_is_gone_on_from_by_an_empty_folder(tmp_path, kind: str) -> None:
    url = {"file": f"file://{tmp_path}/store/run", "memory": "memory://bucket/run", "dir": f"breaking://{tmp_path}/store"}[kind]
    store = CheckpointStore(url, keep=2)
    assert store.fetch(tmp_path / "nothing") is None
    for step in range(1, 5):
        assert upload(store, tmp_path / "run", step) is None
    files, root = fsspec.core.url_to_fs(url)
    assert sorted(Path(name).name for name in files.ls(root, detail=False)) == ["latest", "step-00000003", "step-00000004"]
    assert CheckpointStore(url, keep=2).fetch(tmp_path / "elsewhere") == "step-00000004"
    assert_is(tmp_path / "elsewhere", 4)


def test_an_upload_that_breaks_off_anywhere_leaves_a_whole_one_to_go_on_from(tmp_path) -> None:
    url, before = f"breaking://{tmp_path}/store", 2
    store = CheckpointStore(url, keep=2)
    for step in (1, 2):
        assert upload(store, tmp_path / "run", step) is None
    for step in range(3, 30):
        Breaking.at, Breaking.changes = step - 2, 0
        error = upload(store, tmp_path / "run", step)
        Breaking.at = 0
        there = tmp_path / f"there-{step}"
        found = int(CheckpointStore(url, keep=2).fetch(there)[5:])
        assert found in (before, step)
        assert_is(there, found)
        before = found
        if error is None:
            break
        assert "could not be copied to train.checkpoint_store breaking://" in str(error)
        assert "ConnectionError: broken off" in str(error)
    assert step > 7, "it makes more changes than that"
    assert found == step
    assert len(list((tmp_path / "store").glob("step-*"))) == 2, "what was broken off is cleared away"


def test_what_was_altered_in_the_store_is_refused_by_name(tmp_path) -> None:
    store = CheckpointStore(f"file://{tmp_path}/store", keep=2)
    upload(store, tmp_path / "run", 1)
    weights = tmp_path / "store/step-00000001/model/weights"
    weights.write_bytes(bytes(1000))
    with pytest.raises(CheckpointError, match=r"model/weights was altered"):
        store.fetch(tmp_path / "elsewhere")
    assert latest_checkpoint(tmp_path / "elsewhere/checkpoints") is None
    (tmp_path / "store/latest").write_bytes(b"\xff\xfestep")
    weights.write_bytes(b"\x01" * 1000)
    assert store.fetch(tmp_path / "another") == "step-00000001", "a pointer that was cut short is not needed"


def test_secrets_and_unknown_stores_are_refused() -> None:
    with pytest.raises(ValueError, match="credentials from the environment") as caught:
        TrainConfig(checkpoint_store="s3://key:verysecret@bucket/run")
    assert "this begins with s3:" in str(caught.value)
    with pytest.raises(ConfigError, match="checkpoint_store nowhere://there cannot be reached"):
        CheckpointStore("nowhere://there", keep=1)


async def test_a_run_goes_on_on_a_machine_whose_folder_is_empty(tmp_path) -> None:
    whole = Rig(run_config(tmp_path / "whole"))
    await whole.run()
    config = run_config(tmp_path / "run", train={"checkpoint_store": f"memory://{tmp_path.name}"})
    notes: list[str] = []
    first = Rig(config, at_step=(4, lambda rig: rig.stop.set()), store=open_store(config, notes.append))
    with first.checkpoints.copied():
        assert await first.run() == "stopped"
    shutil.rmtree(tmp_path / "run")
    store = open_store(config, notes.append)
    assert "was brought from memory://" in notes[0]
    second = Rig(config, store=store)
    assert second.resumed_from >= 4
    with second.checkpoints.copied():
        assert await second.run() == "finished"
    assert second.losses() == whole.losses(), "the lines before it too"
