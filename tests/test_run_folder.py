"""A run's folder: whose it is, what may change when a run goes on, and lines that were cut short."""

from __future__ import annotations

import shutil

import pytest

from bbopd.errors import CheckpointError, ConfigError
from bbopd.pipeline.folder import RunFolder
from tests.loop_rig import Rig, run_config


async def test_after_a_checkpoint_another_configuration_is_refused_by_its_first_difference(tmp_path):
    first = Rig(run_config(tmp_path / "run"), at_step=(3, lambda rig: rig.stop.set()))
    assert await first.run() == "stopped"
    with pytest.raises(ConfigError, match=r"train\.batch_tokens = 48, this one has 96"):
        RunFolder.open(run_config(tmp_path / "run", train={"batch_tokens": 96}), command="test")
    again = Rig(run_config(tmp_path / "run", train={"lr": 5e-4}))
    assert again.changes == ["train.lr is now 0.0005, and was 0.001"]
    assert again.resumed_from >= 3
    again.close()


def test_before_a_checkpoint_everything_may_be_mended(tmp_path):
    folder, _ = RunFolder.open(run_config(tmp_path / "run"), command="test")
    (folder.root / "metrics.jsonl").write_text('{"step": 1}\n')
    RunFolder.open(run_config(tmp_path / "run"), command="test")
    assert folder.read_lines("metrics.jsonl")
    RunFolder.open(run_config(tmp_path / "run", train={"batch_tokens": 96}), command="test")
    assert not folder.read_lines("metrics.jsonl")
    assert folder.read_json("run.json")["config"]["train"]["batch_tokens"] == 96


def test_a_folder_serves_one_process_at_a_time(tmp_path):
    folder, _ = RunFolder.open(run_config(tmp_path / "run"), command="test")
    with folder.lock(), pytest.raises(ConfigError, match="another process"), folder.lock():
        pass
    with folder.lock():
        pass


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # of TensorBoard's own thread
async def test_a_folder_deleted_under_a_run_is_said_and_not_made_again(tmp_path):
    rig = Rig(run_config(tmp_path / "run"), at_step=(5, lambda rig: shutil.rmtree(rig.folder.root)))
    with pytest.raises(CheckpointError, match=r"run's folder .*run was deleted or moved while it ran"):
        await rig.run()
    assert not rig.folder.root.exists()


def test_a_finished_run_is_not_run_again(tmp_path):
    folder, _ = RunFolder.open(run_config(tmp_path / "run"), command="test")
    folder.write_json("summary.json", {"status": "finished"})
    with pytest.raises(ConfigError, match="finished run"):
        RunFolder.open(run_config(tmp_path / "run"), command="test")


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path):
    folder, _ = RunFolder.open(run_config(tmp_path / "run"), command="test")
    (folder.root / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "lo')
    assert [line["step"] for line in folder.read_lines("metrics.jsonl")] == [1, 2]
    folder.rewind("metrics.jsonl", 1)
    assert (folder.root / "metrics.jsonl").read_text() == '{"step": 1}\n'
