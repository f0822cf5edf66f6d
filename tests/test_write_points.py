"""A process that is killed at any point of a checkpoint's writing leaves the one before, or the new one, named and whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed

from bbopd.trainer import latest_checkpoint, load_checkpoint
from bbopd.trainer.write_points import OF_ONE_PROCESS, OF_PUBLISHING, OF_RANKS
from tests.tiny_models import tiny_llama
from tests.trainer_ranks import RESUMED

# forks for every checkpoint, so it must be without threads of its own
WRITER = """
import json, os, signal, sys, warnings
from pathlib import Path
import torch
from tests.tiny_models import tiny_llama, tiny_tokenizer
from bbopd.config import TrainConfig
from bbopd.trainer import build_optimizer, save_checkpoint
from bbopd.trainer.write_points import watched

model, tokenizer = tiny_llama(hidden=16), tiny_tokenizer()
optimizer = build_optimizer(model, TrainConfig())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()

def end():
    os.kill(os.getpid(), signal.SIGKILL)

def save(root, step):
    for parameter in model.parameters():
        parameter.data.fill_(float(step))
    beside = {"average": {"a": torch.full((3,), float(step))}}
    options = {"model": model, "tokenizer": tokenizer, "optimizer": optimizer, "state": {"step": step}, "keep": 2, "beside": beside}
    save_checkpoint(Path(root), step, **options)

def end_at_change(root, number):
    # of the disk, as far as Python makes them: files opened to write, folders made, names changed and removed
    seen = 0
    def count(event, arguments):
        nonlocal seen
        is_change = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
        if is_change or event == "open" and root in str(arguments[0]) and arguments[2] & os.O_ACCMODE:
            seen += 1
            if seen == number:
                end()
    sys.addaudithook(count)

warnings.simplefilter("ignore")  # Python warns of any fork
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        if isinstance(asked["at"], int):
            end_at_change(asked["root"], asked["at"])
        with watched(lambda point: end() if point == asked["at"] else None):
            save(asked["root"], asked["step"])
        os._exit(0)
    print(os.waitpid(child, 0)[1], flush=True)
"""


@pytest.fixture(scope="module")
def writer() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        yield process
        process.stdin.close()


def save(writer: Any, root: Path, step: int, at: str | int | None = None) -> bool:
    """Whether the writer was killed on its way."""
    writer.stdin.write(json.dumps({"root": str(root), "step": step, "at": at}) + "\n")
    writer.stdin.flush()
    return os.waitstatus_to_exitcode(int(writer.stdout.readline())) != 0


def found_step(root: Path, model: Any, optimizer: Any) -> int:
    """The step of what ``latest`` names, all of which is of that step."""
    folder = latest_checkpoint(root)
    step = load_checkpoint(folder, model=model, optimizer=optimizer)["step"]
    assert all(bool((parameter == step).all()) for parameter in model.parameters())
    assert int(folder.stem[5:]) == step
    return step


def test_a_kill_at_every_point_leaves_a_whole_checkpoint(writer, tmp_path) -> None:
    root, model = tmp_path / "checkpoints", tiny_llama(hidden=16)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        assert not save(writer, root, step)
    is_new = OF_PUBLISHING[OF_PUBLISHING.index("latest") :]
    before = 2
    for step, point in enumerate((*OF_ONE_PROCESS, *OF_PUBLISHING), start=3):
        assert save(writer, root, step, at=point), f"{point} was not reached"
        assert found_step(root, model, optimizer) == (step if point in is_new else before), point
        before = step if point in is_new else before
    assert not save(writer, root, 99)
    assert found_step(root, model, optimizer) == 99
    assert sorted(path.name for path in root.iterdir()) == ["latest", *sorted(path.name for path in root.glob("step-*"))]
    assert len(list(root.glob("step-*"))) == 2


def test_the_first_checkpoint_of_all_is_there_or_not(writer, tmp_path) -> None:
    root, model = tmp_path / "checkpoints", tiny_llama(hidden=16)
    for point in ("begun", "manifest", "synced"):
        assert save(writer, root, 1, at=point)
        assert latest_checkpoint(root) is None
    assert save(writer, root, 1, at="renamed"), "without a pointer, what is whole is found"
    assert found_step(root, model, torch.optim.AdamW(model.parameters())) == 1


@pytest.mark.slow
def test_a_kill_at_every_change_of_the_disk_leaves_a_whole_checkpoint(writer, tmp_path) -> None:
    root, model = tmp_path / "checkpoints", tiny_llama(hidden=16)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2):
        assert not save(writer, root, step)
    before, kills = 2, 0
    for kills in range(1, 1000):
        step = kills + 2
        if not save(writer, root, step, at=kills):
            break
        found = found_step(root, model, optimizer)
        assert found in (before, step)
        before = found
    assert kills > 30, "it writes and removes more files than that"
    assert found_step(root, model, optimizer) == step


@pytest.mark.slow
def test_ranks_killed_at_every_point_leave_a_whole_checkpoint(tmp_path) -> None:
    points = [(0, point) for point in (*OF_RANKS, *OF_PUBLISHING)] + [(1, "shards copied")]
    worlds = {f"{rank}, {point}": (rank, point) for rank, point in points}
    stores = {name: torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in worlds}
    (tmp_path / "ports.json").write_text(json.dumps({name: store.port for name, store in stores.items()}))
    (tmp_path / "worlds.json").write_text(json.dumps(worlds))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-m", "tests.killed_ranks", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, (_, point) in worlds.items():
        alone = RESUMED.alone()
        found = latest_checkpoint(tmp_path / name)
        step = load_checkpoint(found, model=alone.model, optimizer=alone.optimizer)["step"]
        is_new = point in OF_PUBLISHING[OF_PUBLISHING.index("latest") :]
        assert step == (3 if is_new else 2), name
        expected = RESUMED.alone()
        for number in range(step):
            expected.train_step(RESUMED.micro_batches(number))
        for (key, ours), (_, theirs) in zip(alone.weights(), expected.weights(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda text, at=(name, key): f"{at}: {text}")
