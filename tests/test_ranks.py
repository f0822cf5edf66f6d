"""A student split over 1, 2 and 4 processes: the update of one process, checkpoints for any number, and an end to all where one fails.

One process (tests/trainer_ranks.py) forks all the ranks, world after world; the tests look at what these have left.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from safetensors.torch import load_file

from bbopd.cli.execute import INTERRUPTED
from bbopd.config import RunConfig
from bbopd.data.shares import share_over_ranks
from bbopd.errors import CheckpointError, ConfigError
from bbopd.modeling import adapter_parameters
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.ranked import check_ranked
from bbopd.teachers.fake import FakeBackend
from bbopd.trainer import latest_checkpoint, load_checkpoint, save_checkpoint
from bbopd.trainer.messages import buffers, describe, rebuild
from bbopd.types import Prompt, Rollout
from tests.cli_runs import WORDS
from tests.loop_rig import run_config
from tests.serving import serving
from tests.spoilt_objective import install
from tests.test_bad_updates import check_lines, saved_state
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer
from tests.trainer_ranks import ADAPTED, CASES, LORA, RESUMED, STEPS, STOPPED_S, TIMEOUT_S, WORLDS

LIMIT_S = 480


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks of all worlds have left."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = RESUMED.alone()
    for step in range(2):
        alone.train_step(RESUMED.micro_batches(step))
    save_checkpoint(
        folder / "alone", 2, model=alone.model, tokenizer=tiny_tokenizer(), optimizer=alone.optimizer, state={"step": 2}, keep=3
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    stores = {name: torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for name in WORLDS}
    (folder / "ports.json").write_text(json.dumps({name: store.port for name, store in stores.items()}))
    install(folder)
    with serving(FakeBackend(262)) as [teacher]:
        (folder / "run.json").write_text(json.dumps(tiny_run(folder, teacher.port)))
        with (folder / "log").open("w") as log:
            command = [sys.executable, "-m", "tests.trainer_ranks", str(folder)]
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=LIMIT_S, check=False)
    assert done.returncode == 0, (folder / "log").read_text()[-3000:]
    return folder


def tiny_run(folder: Path, port: int) -> dict[str, Any]:
    model = save_folder(folder / "student", tiny_llama(vocab_size=262, layers=2), tiny_tokenizer())
    text = folder / "corpus.txt"
    text.write_text("\n\n\n".join(" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(30)))
    budget = {"cold_start_tokens": 40, "on_policy_tokens": 100, "batch_tokens": 64, "micro_batch_tokens": 128, "max_seq_len": 64}
    return {
        "student": {"model": str(model), "dtype": "float32", "device": "cpu"},
        "teacher": {"target": f"grpc://127.0.0.1:{port}"},
        "rollouts": {"per_update": 8, "max_new_tokens": 16, "max_staleness": 0},
        "objective": {"ramp": 0.2},
        "train": {**budget, "lr": 1e-3, "checkpoint_every": 2},
        "data": {"prompts": [{"text": str(text)}], "prompt_tokens": 8, "response_tokens": 16, "filters": {"max_foreign": 0.3}},
        "eval": {"sequences": 2, "rollouts": 2, "max_new_tokens": 8},
    }


def found(folder: Path, world: str, rank: int = 0) -> Any:
    """What a rank has found; it must have come to its end."""
    place = folder / f"{world}.{rank}"
    assert Path(f"{place}.pt").exists(), Path(f"{place}.txt").read_text()[-3000:]
    return torch.load(f"{place}.pt", weights_only=False)


def assert_same_steps(ours: list[Any], expected: list[Any], same: float = 2e-5) -> None:
    for one, other in zip(ours, expected, strict=True):
        for name in ("loss", "ce", "kd", "grad_norm", "teacher_tail_mass"):
            expected_figure = getattr(other, name)
            assert getattr(one, name) == (expected_figure and pytest.approx(expected_figure, rel=same)), name
        for name in ("step", "lr", "tokens", "labelled_tokens", "signal_tokens", "rollout_tokens", "packed_tokens", "floored"):
            assert getattr(one, name) == getattr(other, name), name
        assert {**other.more, **one.more} == pytest.approx(other.more, rel=1e-3)


# ------------------------------------------------------------ the same update


@pytest.mark.parametrize("name", CASES)
def test_ranks_together_make_the_update_of_one_process(folder: Path, name: str) -> None:
    case = CASES[name]
    alone = case.alone()
    begun = {key: weight.clone() for key, weight in alone.weights()}
    expected = [alone.train_step(case.micro_batches(step)) for step in range(STEPS)]
    assert expected[-1].grad_norm > case.options()["train"].clip, "clipping is a part of it"
    for world in case.worlds:
        ours = found(folder, str(world))[name]
        assert all(torch.equal(weight, begun[key]) for key, weight in ours["begun"].items()), "from rank 0, bit for bit"
        assert_same_steps(ours["steps"], expected, case.same)
        assert ours["weights"].keys() == dict(alone.weights()).keys()
        assert set(ours["tensors"]) == dict(alone.model.named_parameters()).keys()
        for key, weight in alone.weights():
            torch.testing.assert_close(
                ours["weights"][key], weight, rtol=5 * case.same, atol=5 * case.same, msg=lambda text, at=(world, key): f"{at}: {text}"
            )


def test_a_batch_that_one_rank_cannot_train_on_is_an_error_of_all_and_leaves_the_weights(folder: Path) -> None:
    ours = found(folder, "2")["bad batch"]
    assert ours["said"] == "on rank 1: the batch is spoilt"
    assert_same_steps([ours["step"]], [CASES["tied"].alone().train_step(CASES["tied"].micro_batches(0))])


def test_pushes_and_checkpoints_may_come_from_another_thread_meanwhile(folder: Path) -> None:
    ours, alone = found(folder, "2")["at once"], CASES["tied"].alone()
    assert_same_steps(ours["steps"], [alone.train_step(CASES["tied"].micro_batches(step)) for step in range(STEPS)])
    assert ours["pulled"] >= len(dict(alone.weights()))


def test_a_batch_comes_out_of_its_message_as_it_went_in() -> None:
    for case in ("tied", "untied"):
        for batch in CASES[case].micro_batches(0):
            tensors: list[torch.Tensor] = []
            described = json.loads(json.dumps(describe([batch], tensors)))
            empty = list(buffers(described))
            assert [len(one) for one in empty] == [len(one) for one in tensors]
            again: list[torch.Tensor] = []
            (there,) = rebuild(described, iter(tensors))
            describe([there], again)
            assert type(there.teacher) is type(batch.teacher)
            assert all(torch.equal(one, other) for one, other in zip(tensors, again, strict=True))
            assert there.target_ids.dtype == torch.int64
            assert there.token_weight.shape == batch.token_weight.shape


# ------------------------------------------------------------ shares


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_shares_hold_everything_once_and_are_alike_within_a_round(ranks: int) -> None:
    generator = torch.Generator().manual_seed(ranks)
    sizes = torch.randint(5, 60, (41,), generator=generator).tolist()
    items = [Rollout(f"r{i}", Prompt(f"p{i}", (1, 2)), tuple(range(3, size + 1)), draw=i) for i, size in enumerate(sizes)]
    shares = share_over_ranks([items[:20], items[20:]], ranks, micro_batch_tokens=128)
    assert sorted(item.draw for share in shares for item in share) == list(range(41))
    tokens = [sum(len(item.all_ids) for item in share) for share in shares]
    assert max(tokens) <= 128
    assert -(-len(shares) // ranks) <= -(-sum(tokens) // (128 * ranks)) + 1
    for first in range(0, len(tokens), ranks):
        together = tokens[first : first + ranks]
        assert max(together) - min(together) < 30
    assert share_over_ranks([items[:1]], ranks, 4) == [items[:1]], "a longer sequence goes alone"


# ------------------------------------------------------------ checkpoints


def test_a_checkpoint_is_gone_on_from_by_any_number_of_ranks(folder: Path) -> None:
    """By two ranks, then four, then one process: the run of one."""
    whole = RESUMED.alone()
    expected = [whole.train_step(RESUMED.micro_batches(step)) for step in range(6)]
    four = found(folder, "4")["go on"]
    assert_same_steps(four["steps"], expected[2:4])
    written, read = found(folder, "2")["begin"]["weights"], four["weights"]
    assert written.keys() == read.keys()
    assert all(torch.equal(written[name], read[name]) for name in read), "as they were when it was begun, not when it was written"

    last = latest_checkpoint(folder / "checkpoints")
    assert last is not None
    assert last.name == "step-00000004"
    alone = RESUMED.alone()
    alone.steps_done = load_checkpoint(last, model=alone.model, optimizer=alone.optimizer)["step"]
    assert_same_steps([alone.train_step(RESUMED.micro_batches(step)) for step in (4, 5)], expected[4:])


def test_ranks_drop_an_update_and_go_back_to_a_checkpoint_together(folder: Path) -> None:
    alone = RESUMED.alone()
    expected = [alone.train_step(RESUMED.micro_batches(step)) for step in range(2)]
    ours = found(folder, "2")["goes back"]
    assert_same_steps([ours["step"]], expected[1:])
    for name, weight in ours["saved"].items():
        assert torch.equal(ours["dropped"][name], weight)
        assert torch.equal(ours["back"][name], weight)


def test_of_a_student_with_adapters_these_alone_are_saved_and_brought_back(folder: Path) -> None:
    """By the ranks, and by one process."""
    ours, alone = found(folder, "2")["adapters"], ADAPTED.alone()
    last = latest_checkpoint(folder / "adapters")
    names = {key for file in (last / "shards").glob("*.safetensors") for key in load_file(file)}
    assert {name.partition("/")[2] for name in names} == set(adapter_parameters(alone.model))
    alone.steps_done = load_checkpoint(last, model=alone.model, optimizer=alone.optimizer)["step"]
    for name, weight in alone.weights():
        assert torch.equal(weight, ours["saved"][name]), name
        assert torch.equal(weight, ours["back"][name]), name
        has_adapters = name.endswith(tuple(f"{target}.weight" for target in LORA.target_modules))
        assert name not in ours["changed"] or torch.equal(weight, ours["changed"][name]) != has_adapters
    whole = ADAPTED.alone()
    expected = [whole.train_step(ADAPTED.micro_batches(step)) for step in range(2)]
    assert_same_steps([alone.train_step(ADAPTED.micro_batches(1))], expected[1:])
    description = json.loads((last / "model/adapter_config.json").read_text())
    assert description["r"] == 4
    other = ADAPTED.alone()
    with torch.no_grad():
        other.model.get_input_embeddings().weight.add_(1.0)
    with pytest.raises(CheckpointError, match="beside other frozen weights"):
        load_checkpoint(last, model=other.model, optimizer=other.optimizer)


def test_a_checkpoint_of_one_process_is_gone_on_from_by_two(folder: Path) -> None:
    whole = RESUMED.alone()
    expected = [whole.train_step(RESUMED.micro_batches(step)) for step in range(3)]
    assert_same_steps(found(folder, "2")["from one"]["steps"], expected[2:])


def test_each_rank_has_its_own_generator_back(folder: Path) -> None:
    first, second, third, fourth = (found(folder, "4", rank)["go on"]["generator"] for rank in range(4))
    assert torch.equal(second, torch.Generator().manual_seed(101).get_state())
    assert not torch.equal(first, second)
    assert torch.equal(third, fourth), "there was none of its number"


def test_shards_of_another_model_are_refused_by_every_rank(folder: Path) -> None:
    for rank in range(2):
        assert "holds another model" in found(folder, "2", rank)["another model"]["said"]


# ------------------------------------------------------------ failures


@pytest.mark.parametrize(
    ("world", "heard_by", "said"),
    [
        ("first fails", 1, "rank 0 has failed: ZeroDivisionError: broken"),
        ("second fails", 0, "rank 1 has failed: ZeroDivisionError: broken"),
        ("second is killed", 0, "rank 0 has lost another rank"),
    ],
)
def test_what_one_rank_fails_of_ends_the_others_with_the_cause(folder: Path, world: str, heard_by: int, said: str) -> None:
    heard = found(folder, world, heard_by)
    assert heard["kind"] == "RankError"
    assert said in heard["said"]
    assert heard["seconds"] < TIMEOUT_S, "it is heard of at once"


@pytest.mark.parametrize(
    ("world", "heard_by", "said"),
    [
        ("first is stopped", 1, r"rank 0 has not been heard of for \d+ s, and was at update 2"),
        ("second is stopped", 0, r"rank 1 has not been heard of for \d+ s, and was told to accumulate, after update 1,"),
    ],
)
def test_a_rank_that_answers_no_more_is_named_within_the_timeout(folder: Path, world: str, heard_by: int, said: str) -> None:
    heard = found(folder, world, heard_by)
    assert heard["kind"] == "RankError"
    assert re.search(said, heard["said"]), heard["said"]
    assert heard["seconds"] < STOPPED_S + 60, "but for a machine that is busy"


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"student": {"model": "unused", "lora": {"rank": 4}, "quantize": "nf4"}}, "student.quantize cannot be trained by several ranks"),
        ({"train": {"optimizer": "adamw_8bit"}}, "set adamw"),
    ],
)
def test_what_ranks_cannot_train_is_refused(tmp_path: Path, sections: dict[str, Any], said: str) -> None:
    config: RunConfig = run_config(tmp_path, **sections)
    with pytest.raises(ConfigError, match=said):
        check_ranked(config)
    check_ranked(run_config(tmp_path))


# ------------------------------------------------------------ whole runs


def test_a_run_of_two_ranks_consumes_the_data_of_one(folder: Path) -> None:
    assert [found(folder, "run, 1"), found(folder, "run, 2"), found(folder, "run, 2", 1)] == [0, 0, 0]
    one, two = ([json.loads(line) for line in (folder / f"run-{n}" / "metrics.jsonl").read_text().splitlines()] for n in (1, 2))
    assert len(one) > 3
    for ours, expected in zip(two, one, strict=True):
        for name in ("step", "phase", "tokens", "rollout_tokens", "labelled_tokens", "packed_tokens", "on_policy_tokens", "lr"):
            assert ours[name] == expected[name], name
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert ours["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-3)
    summaries = [json.loads((folder / f"run-{n}" / "summary.json").read_text()) for n in (1, 2)]
    assert summaries[0]["sequences"] == summaries[1]["sequences"]
    states = [json.loads((latest_checkpoint(folder / f"run-{n}" / "checkpoints") / "state.json").read_text())["state"] for n in (1, 2)]
    assert states[0]["position"] == states[1]["position"]
    models = [_weights(folder / f"run-{n}" / "model") for n in (1, 2)]
    for name, weight in models[0].items():
        torch.testing.assert_close(models[1][name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_of_two_ranks_goes_back_with_every_token_in_the_books(folder: Path) -> None:
    """The loss of one rank is NaN, in one update; the student trains adapters."""
    assert [found(folder, "spoilt, 2"), found(folder, "spoilt, 2", 1)] == [0, 0]
    run = RunFolder(folder / "spoilt-2")
    state = saved_state(run)
    check_lines(run, state, least=100)
    assert (state.bad_updates, state.rolled_back_updates) == ({"nonfinite": 1}, 5 - state.cold_start_steps)
    lines, undone = run.read_lines("metrics.jsonl"), run.read_lines("rolled_back.jsonl")
    again = {line["step"]: line for line in lines}
    assert all(again[line["step"]]["cycle"] > line["cycle"] and again[line["step"]]["loss"] != line["loss"] for line in undone)
    drawn = [line["cycle"] for line in (*lines, *undone)]
    assert set(drawn) == set(range(1, state.cycle + 1)), "no cycle is drawn twice"
    adapters, model = _weights(run.root / "adapter", "adapter_model"), _weights(run.root / "model")
    assert all(bool(value.any()) for value in adapters.values()), "B too, which is 0 at first"
    begun = _weights(folder / "student")
    changed = {name for name, value in model.items() if not torch.equal(value, begun[name])}
    assert changed == {name for name in begun if "_proj" in name}
    numbers = json.loads((run.root / "summary.json").read_text())["sequences"]
    assert numbers["drawn"] == sum(count for name, count in numbers.items() if name != "drawn")


def test_a_run_of_two_ranks_is_gone_on_from_its_store_by_one(folder: Path) -> None:
    """On another machine, as it were: its folder is empty."""
    assert [found(folder, "stored, 2"), found(folder, "stored, 2", 1), found(folder, "brought, 1")] == [INTERRUPTED, 0, 0]
    cut, whole, run = (RunFolder(folder / name) for name in ("stored-2", "run-1", "brought-1"))
    assert 3 <= saved_state(cut).step < saved_state(whole).step
    one, two = (each.read_lines("metrics.jsonl") for each in (whole, run))
    for ours, expected in zip(two, one, strict=True):
        assert [ours[key] for key in ("step", "cycle", "tokens", "on_policy_tokens")] == [
            expected[key] for key in ("step", "cycle", "tokens", "on_policy_tokens")
        ]
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    assert saved_state(run).sequences() == saved_state(whole).sequences()
    assert "was brought from file://" in (folder / "brought, 1.0.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_is_stopped_ends_the_others_of_a_whole_run(tmp_path: Path, stopped: int) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with serving(FakeBackend(262)) as [teacher]:
        run = tiny_run(tmp_path, teacher.port)
        run["train"] |= {"on_policy_tokens": 1_000_000, "parallel": {"timeout": 8}}
        (tmp_path / "run.yaml").write_text(json.dumps(run | {"output": str(tmp_path / "run")}))
        about = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
        command = [sys.executable, "-m", "bbopd", "distill", str(tmp_path / "run.yaml"), "--plain"]
        logs = [(tmp_path / f"log.{rank}").open("w+") for rank in range(2)]
        ranks = [
            subprocess.Popen(command, env={**os.environ, **about, "RANK": str(rank), "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
            for rank, log in enumerate(logs)
        ]
        try:
            metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + LIMIT_S
            while not metrics.exists() or metrics.read_text().count("\n") < 3:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            os.kill(ranks[stopped].pid, signal.SIGSTOP)
            assert ranks[1 - stopped].wait(timeout=120) == 8
            logs[1 - stopped].seek(0)
            assert f"rank {stopped} has not been heard of" in logs[1 - stopped].read()
        finally:
            for rank, log in zip(ranks, logs, strict=True):
                rank.kill()
                rank.wait()
                log.close()
    summary = tmp_path / "run/summary.json"
    assert summary.exists() == (stopped == 1)
    if stopped == 1:
        assert "rank 1 has not been heard of" in json.loads(summary.read_text())["error"]


def _weights(model: Path, name: str = "model") -> dict[str, torch.Tensor]:
    return load_file(model / f"{name}.safetensors")
