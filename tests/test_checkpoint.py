"""Checkpoints continue a run bit for bit, and neither a kill, a cut file nor a full disk costs more than the one being written."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bbopd.config import ObjectiveConfig, TrainConfig
from bbopd.errors import CheckpointError
from bbopd.objectives import make_objective
from bbopd.trainer import Trainer, latest_checkpoint, load_beside, load_checkpoint, require_space, save_checkpoint
from tests.batches import pack, random_sequences, random_teacher
from tests.tiny_models import tiny_llama, tiny_qwen2, tiny_tokenizer

OBJECTIVE = ObjectiveConfig(ramp=4)
TRAIN = TrainConfig(lr=1e-3, warmup=2, schedule="cosine")


def make_trainer(model=None) -> Trainer:
    return Trainer(model or tiny_llama(), make_objective(OBJECTIVE), train=TRAIN, objective_config=OBJECTIVE, planned_steps=8)


def batch_of(step: int):
    sequences = random_sequences(3, seed=step)
    return pack(sequences, random_teacher(sequences, seed=step + 50))


def save(trainer: Trainer, root: Path, keep: int = 2) -> Path:
    return save_checkpoint(
        root,
        trainer.steps_done,
        model=trainer.model,
        tokenizer=tiny_tokenizer(),
        optimizer=trainer.optimizer,
        state={"steps_done": trainer.steps_done},
        keep=keep,
    )


def load(folder: Path, trainer: Trainer) -> dict:
    state = load_checkpoint(folder, model=trainer.model, optimizer=trainer.optimizer)
    trainer.steps_done = state["steps_done"]
    return state


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen2], ids=["tied", "untied"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path, make):
    whole = make_trainer(make())
    expected = [whole.train_step([batch_of(step)]) for step in range(6)]
    first = make_trainer(make())
    for step in range(3):
        first.train_step([batch_of(step)])
    folder = save(first, tmp_path)
    second = make_trainer(make(seed=99))  # other weights, until the checkpoint comes
    load(latest_checkpoint(tmp_path), second)
    found = [second.train_step([batch_of(step)]) for step in range(3, 6)]
    for a, b in zip(found, expected[3:], strict=True):
        assert (a.step, a.loss, a.grad_norm, a.lr, a.kd_weight) == (b.step, b.loss, b.grad_norm, b.lr, b.kd_weight)
    for (name, a), (_, b) in zip(second.weights(), whole.weights(), strict=True):
        assert torch.equal(a, b), name
    assert folder.name == "step-00000003"


def test_other_models_beside_the_student_are_kept_and_guarded_with_it(tmp_path):
    trainer = make_trainer()
    beside = {"discriminator": {"weights/a": torch.randn(3, 4).t(), "moments/b": torch.randn(5)}, "reference": {"c": torch.randn(2)}}
    folder = save_checkpoint(
        tmp_path,
        1,
        model=trainer.model,
        tokenizer=tiny_tokenizer(),
        optimizer=trainer.optimizer,
        state={"steps_done": 1},
        keep=2,
        beside=beside,
    )
    load(folder, trainer)
    found = load_beside(folder)
    assert found.keys() == beside.keys()
    for name, tensors in beside.items():
        assert found[name].keys() == tensors.keys()
        assert all(torch.equal(found[name][key], tensor) for key, tensor in tensors.items())
    assert load_beside(save(trainer, tmp_path)) == {}
    with (folder / "reference.safetensors").open("r+b") as file:
        file.truncate(20)
    with pytest.raises(CheckpointError, match=r"reference.safetensors has 20 bytes"):
        load(folder, trainer)
    with pytest.raises(CheckpointError, match=r"more checkpoints of 1,000,\d{3},\d{3},\d{3},\d{3} bytes"):
        require_space(tmp_path / "new", model=trainer.model, keep=1, beside=10**15)


def test_random_generators_go_on_where_they_were(tmp_path):
    trainer = make_trainer()
    torch.manual_seed(3), random.seed(4), np.random.seed(5)
    torch.rand(7), random.gauss(0, 1), np.random.normal(size=3)
    folder = save(trainer, tmp_path)
    expected = (torch.rand(5).tolist(), random.gauss(0, 1), random.random(), np.random.normal(size=4).tolist())
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    load(folder, trainer)
    assert (torch.rand(5).tolist(), random.gauss(0, 1), random.random(), np.random.normal(size=4).tolist()) == expected


def test_the_model_in_it_is_an_ordinary_hugging_face_folder(tmp_path, capfd):
    trainer = make_trainer()
    trainer.train_step([batch_of(0)])
    folder = save(trainer, tmp_path)
    assert capfd.readouterr() == ("", "")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    for (name, a), (_, b) in zip(loaded.named_parameters(), trainer.weights(), strict=True):
        assert torch.equal(a, b), name
    text = "the inn"
    assert AutoTokenizer.from_pretrained(folder / "model").encode(text) == tiny_tokenizer().encode(text)


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    trainer = make_trainer()
    (tmp_path / ".tmp-step-00000009").mkdir()
    (tmp_path / ".tmp-latest").touch()
    for _ in range(3):
        save(trainer, tmp_path)
        trainer.train_step([batch_of(0)])
    save(trainer, tmp_path)
    again = save(trainer, tmp_path)  # the same step once more: a folder of its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000003", "step-00000003.2"]
    assert latest_checkpoint(tmp_path) == again
    trainer.train_step([batch_of(0)])
    save(trainer, tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000004"]


def two_checkpoints(root: Path) -> tuple[Trainer, Path, Path]:
    trainer = make_trainer()
    trainer.train_step([batch_of(0)])
    older = save(trainer, root)
    trainer.train_step([batch_of(1)])
    return trainer, older, save(trainer, root)


def test_latest_falls_back_where_its_checkpoint_is_gone(tmp_path):
    _, older, newer = two_checkpoints(tmp_path)
    newer.rename(tmp_path / ".tmp-gone")
    assert latest_checkpoint(tmp_path) == older
    (tmp_path / "latest").unlink()
    assert latest_checkpoint(tmp_path) == older
    (older / "manifest.json").unlink()
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("model/model.safetensors", cut, "was cut short"),
        ("optimizer.safetensors", cut, "was cut short"),
        ("optimizer.safetensors", flip, "was altered"),
        ("model/tokenizer.json", Path.unlink, "is missing"),
        ("state.json", flip, "was altered"),
        ("manifest.json", cut, "is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_with_the_way_out(tmp_path, name, spoil, message):
    trainer, older, newer = two_checkpoints(tmp_path)
    spoil(newer / name)
    before = {key: value.clone() for key, value in trainer.weights()}
    with pytest.raises(CheckpointError, match=message) as caught:
        load(newer, trainer)
    assert str(newer / name) in str(caught.value)
    assert str(caught.value).endswith(f"remove {newer} to resume from {older}")
    assert all(torch.equal(value, before[key]) for key, value in trainer.weights())
    assert load(older, trainer) == {"steps_done": 1}


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    folder = save(make_trainer(), tmp_path)
    with pytest.raises(CheckpointError, match="holds another model than the one to be trained"):
        load(folder, make_trainer(tiny_llama(layers=3)))


def test_a_state_that_json_cannot_hold_leaves_nothing_behind(tmp_path):
    trainer = make_trainer()
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(
            tmp_path, 1, model=trainer.model, tokenizer=tiny_tokenizer(), optimizer=trainer.optimizer, state={"x": object()}, keep=1
        )
    assert latest_checkpoint(tmp_path) is None
    save(trainer, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-00000000"]


def huge_model(parameters: int) -> LlamaForCausalLM:
    """A model that takes no memory, with that many float32 parameters, as near as one layer allows."""
    with torch.device("meta"):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=parameters // 64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=1,
                tie_word_embeddings=True,
            )
        )  # fmt: skip


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    model = huge_model(10**15)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match=r"bytes free and a checkpoint needs 4,000,000,.*free some space"):
        save_checkpoint(tmp_path / "new", 1, model=model, tokenizer=tiny_tokenizer(), optimizer=optimizer, state={}, keep=2)
    assert list((tmp_path / "new").iterdir()) == []


def test_a_run_whose_checkpoints_will_not_fit_is_refused_before_it_starts(tmp_path):
    root = tmp_path / "not" / "yet" / "there"
    require_space(root, model=make_trainer().model, keep=2)
    assert list(tmp_path.iterdir()) == []
    free = shutil.disk_usage(tmp_path).free
    model = huge_model(free // 30)  # weights and two moments: 12 bytes a parameter, so two checkpoints fit and three do not
    require_space(root, model=model, keep=1)
    with pytest.raises(CheckpointError, match=r"and 3 more checkpoints of [\d,]+ bytes \(train.keep_checkpoints 2, .*lower train.keep"):
        require_space(root, model=model, keep=2)
    (root / "step-00000001").mkdir(parents=True)
    require_space(root, model=model, keep=2)


@pytest.mark.parametrize("below", ["file", "file/deeper"])
def test_a_folder_that_cannot_be_made_is_said(tmp_path, below):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=rf"could not be written below {tmp_path / below} .*check the disk and the permissions"):
        save(make_trainer(), tmp_path / below)


def test_an_old_checkpoint_that_cannot_be_removed_does_not_hide_the_new_one(tmp_path):
    trainer = make_trainer()
    stuck = tmp_path / ("step-" + "0" * 248)  # too long a name to be set aside
    stuck.mkdir()
    with pytest.raises(CheckpointError, match=r"step-00000000 is whole, but the old .* cannot be removed .*: remove it by hand"):
        save(trainer, tmp_path, keep=1)
    assert load(latest_checkpoint(tmp_path), trainer) == {"steps_done": 0}


def test_a_pointer_that_cannot_be_read_is_said_with_the_way_out(tmp_path):
    save(make_trainer(), tmp_path)
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"latest cannot be read .*remove it to resume from the newest checkpoint"):
        latest_checkpoint(tmp_path)


@pytest.mark.parametrize("limit", [30_000, 150_000], ids=["model", "optimizer"])
def test_a_disk_that_refuses_leaves_the_earlier_checkpoint_whole(tmp_path, limit):
    trainer, older, newer = two_checkpoints(tmp_path)
    trainer.train_step([batch_of(2)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))  # the model has 117 kB, its moments 234 kB
    try:
        with pytest.raises(CheckpointError, match=r"could not be written below .* earlier checkpoints are whole"):
            save(trainer, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", older.name, newer.name]
    assert load(latest_checkpoint(tmp_path), trainer) == {"steps_done": 2}


# forks, so it must be without threads of its own
WRITER = """
import os, sys, warnings
from pathlib import Path
import torch
from tests.tiny_models import tiny_llama, tiny_tokenizer
from bbopd.trainer import build_optimizer, save_checkpoint
from bbopd.config import TrainConfig

model, tokenizer = tiny_llama(hidden=256), tiny_tokenizer()
optimizer = build_optimizer(model, TrainConfig())
for parameter in model.parameters():
    parameter.grad = torch.ones_like(parameter)
optimizer.step()
warnings.simplefilter("ignore")  # Python warns of any fork
for line in sys.stdin:
    first = int(line)
    child = os.fork()
    if child:
        print('child', child, flush=True)
        os.waitpid(child, 0)
        continue
    for step in range(first, first + 10_000):
        for parameter in model.parameters():
            parameter.data.fill_(float(step))
        save_checkpoint(Path(sys.argv[1]), step, model=model, tokenizer=tokenizer, optimizer=optimizer, state={"step": step}, keep=2)
        print('saved', step, flush=True)
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path]), "OMP_NUM_THREADS": "1"}
    model = tiny_llama(hidden=256)
    optimizer = torch.optim.AdamW(model.parameters())
    moments = random.Random(0)
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
    ) as writer:
        reached = 0
        for _ in range(8):
            writer.stdin.write(f"{reached + 1}\n")
            writer.stdin.flush()
            child = _next(writer, "child")
            saved = _next(writer, "saved")  # one whole checkpoint, and then some way into the next ones
            time.sleep(moments.uniform(0.0, 0.3))
            os.kill(child, signal.SIGKILL)
            folder = latest_checkpoint(tmp_path)
            reached = load_checkpoint(folder, model=model, optimizer=optimizer)["step"]
            assert reached == int(folder.stem[5:]) >= saved
            assert all(bool((parameter == reached).all()) for parameter in model.parameters())
        writer.stdin.close()
    assert sum(path.name.startswith("step-") for path in tmp_path.iterdir()) <= 3


def _next(writer: subprocess.Popen, word: str) -> int:
    """The number after ``word``, on its next line; lines of a child since killed are passed over."""
    return next(int(line.split()[1]) for line in writer.stdout if line.startswith(word))
