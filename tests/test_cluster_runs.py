"""Whole runs on a Ray cluster of two nodes: the losses of one process, and exact books whatever is killed meanwhile."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bbopd.cluster.engines import want_engines
from bbopd.pipeline.state import RunState
from bbopd.report.load import load_run
from bbopd.report.table import restarts_line
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.fake_engine import PACE
from tests.ray_nodes import two_nodes
from tests.test_overlap import check_books
from tests.test_ranks import tiny_run
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
LIMIT_S = 400
DRIVER = """
import sys
from bbopd.cluster.driver import Programs, run_on_cluster
from bbopd.config_file import load_config
config, programs = load_config(sys.argv[1]), Programs(engine="tests.cluster_engine")
sys.exit(run_on_cluster(config, sys.argv[2], lambda text: print(text, end="", flush=True), programs))
"""


@pytest.fixture(scope="module")
def pace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seconds that engines take over an answer, as a file."""
    file = tmp_path_factory.mktemp("pace") / "seconds"
    file.write_text("0")
    return file


@pytest.fixture(scope="module")
def cluster(pace: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(PACE, str(pace))
        with two_nodes(cpus=4) as nodes:
            yield nodes.address


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_folder(folder / "teacher", tiny_llama(vocab_size=262, layers=2, seed=1), tiny_tokenizer())
    return folder


def run_file(folder: Path, models: Path, **cluster: Any) -> Path:
    """A run of two ranks, on a node each, and a paid teacher."""
    folder.mkdir(exist_ok=True)
    run = tiny_run(folder, 1)
    run["teacher"] = {
        "serve": {"model": str(models / "teacher"), "dtype": "float32", "device": "cpu"},
        "prices": {"prompt": 1.0, "answer": 1.0},
    }
    run["train"] |= {"on_policy_tokens": 600, "parallel": {"timeout": 120}}
    run["eval"]["every"] = 0
    run["cluster"] = {"ranks": 2, "rank_needs": {"cpus": 3}, "backoff": 0.1, "grace": 30} | cluster
    run["output"] = str(folder / "run")
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder / "run.yaml"


class Driver:
    """A driver in a process of its own."""

    def __init__(self, file: Path, address: str) -> None:
        self.run = file.parent / "run"
        self._log = file.parent / "driver.log"
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        with self._log.open("ab") as log:
            command = [sys.executable, "-c", DRIVER, str(file), address]
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def wait(self) -> str:
        """Until the run is over; what was printed."""
        try:
            status = self._process.wait(LIMIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"not over: {self.said()[-6000:]}") from None
        assert status == 0, self.said()[-6000:]
        return self.said()

    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not is_true():
            assert self._process.poll() is None, self.said()[-6000:]
            assert time.monotonic() < deadline, self.said()[-6000:]
            time.sleep(0.01)

    def steps(self) -> int:
        figures = self.run / "metrics.jsonl"
        return figures.read_text().count("\n") if figures.exists() else 0

    def wait_for_step(self, step: int, rng: random.Random) -> None:
        """A moment in or after the step."""
        self.until(lambda: self.steps() >= step)
        time.sleep(rng.uniform(0.0, 0.3))


def kill(words: tuple[str, ...], *, rank: int | None = None) -> None:
    """SIGKILL to the process that was started with these words; of several ranks, to that one."""
    for place in Path("/proc").iterdir():
        if not place.name.isdigit():
            continue
        try:
            command = (place / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environment = (place / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        is_it = all(any(word in one for one in command) for word in words) and "bbopd.cluster.ward" not in command
        if is_it and (rank is None or f"RANK={rank}" in environment):
            os.kill(int(place.name), signal.SIGKILL)
            return
    raise AssertionError(f"no process of {words}")


def figures(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def check_run(run: Path) -> tuple[RunState, dict[str, Any]]:
    """The books of a finished run are right: each sequence drawn is trained, rejected or pending once."""
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    state = RunState.from_json(json.loads((latest_checkpoint(run / "checkpoints") / "state.json").read_text())["state"])
    check_books(state)
    lines = figures(run)
    assert [line["step"] for line in lines] == list(range(1, state.step + 1))
    assert sum(line["rollout_tokens"] for line in lines) == state.on_policy_tokens
    assert sum(line["tokens"] for line in lines) == state.trained_tokens
    assert summary["sequences"]["drawn"] == sum(summary["sequences"][key] for key in ("trained", "rejected", "pending"))
    return state, summary


@pytest.fixture(scope="module")
def undisturbed(cluster: str, models: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    driver = Driver(run_file(tmp_path_factory.mktemp("undisturbed"), models), cluster)
    assert "2 ranks on" in driver.wait()
    return driver.run


def test_a_run_over_two_nodes_has_the_losses_of_one_process(undisturbed: Path, cluster: str, models: Path, tmp_path: Path) -> None:
    alone = Driver(run_file(tmp_path, models, ranks=1), cluster)
    assert "1 ranks on" in alone.wait()
    ours, expected = figures(undisturbed), figures(alone.run)
    assert len(ours) == len(expected) > 10
    for one, other in zip(ours, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)
        assert (one["tokens"], one["rollout_tokens"]) == (other["tokens"], other["rollout_tokens"])
    for run in (undisturbed, alone.run):
        _, summary = check_run(run)
        assert summary["restarts"] == {"ranks": 0, "teachers": 0, "engines": 0}


@pytest.mark.parametrize("victim", ["first rank", "second rank", "teacher", "driver"])
def test_whatever_is_killed_the_run_ends_as_if_nothing_had_been(
    victim: str, undisturbed: Path, cluster: str, models: Path, tmp_path: Path
) -> None:
    rng = random.Random(victim)
    file = run_file(tmp_path, models)
    driver = Driver(file, cluster)
    driver.wait_for_step(rng.randint(4, 9), rng)
    if victim == "driver":
        driver.kill()
        driver = Driver(file, cluster)
    elif victim == "teacher":
        kill(("serve", "teacher.json"))
    else:
        kill(("distill", str(driver.run)), rank=0 if victim == "first rank" else 1)
    driver.wait()
    state, summary = check_run(driver.run)
    expected_state, expected = check_run(undisturbed)
    assert summary["restarts"] == {"ranks": int("rank" in victim), "teachers": int(victim == "teacher"), "engines": 0}
    assert json.loads((driver.run / "cluster.json").read_text())["drivers"] == 1 + (victim == "driver")
    assert (state.drawn, state.trained_tokens, state.step) == (
        expected_state.drawn,
        expected_state.trained_tokens,
        expected_state.step,
    )
    told = {"first rank": "ranks 1", "second rank": "ranks 1", "teacher": "teachers 1", "driver": ""}[victim]
    assert restarts_line(load_run(driver.run)) == told
    saved = "stopping after what is under way" in (driver.run / "cluster" / "rank-0.log").read_text()
    assert saved == (victim == "driver"), "ranks save and end by themselves where their driver is gone"
    for one, other in zip(figures(driver.run), figures(undisturbed), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)
    paid, needed = summary["teacher_cost"]["requests"], expected["teacher_cost"]["requests"]
    assert needed <= paid <= needed + 8, "no more than a cycle's answers, which were in flight, are paid for twice"


def test_engines_come_go_and_die_while_the_student_writes(cluster: str, models: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, models, engines=[1, 2], rank_needs={"cpus": 1})
    run = json.loads(file.read_text())
    run["rollouts"] |= {"engine": "vllm", "agreement": {"tokens": 0}, "max_staleness": 1}
    run["train"]["on_policy_tokens"] = 2400
    file.write_text(json.dumps(run))
    driver, rng = Driver(file, cluster), random.Random(5)
    driver.wait_for_step(4, rng)
    kill(("sample-server",))
    driver.wait_for_step(driver.steps() + 3, rng)
    want_engines(driver.run, 2)
    driver.until(lambda: "2 now" in driver.said())
    driver.wait_for_step(driver.steps() + 3, rng)
    want_engines(driver.run, 1)
    driver.until(lambda: "it is no more in the list" in driver.said())
    said = driver.wait()
    _, summary = check_run(driver.run)
    assert summary["restarts"] == {"ranks": 0, "teachers": 0, "engines": 1}
    assert "engine 0 ended with exit status 137: started again" in said
    assert "engine 1 joins: 2 engines now" in said
    assert "engine 1 leaves: 1 engines now" in said


def test_engines_are_as_many_as_the_run_waits_for(cluster: str, pace: Path, models: Path, tmp_path: Path) -> None:
    file = run_file(tmp_path, models, ranks=1, engines=[1, 2], rank_needs={"cpus": 1}, scale={"window": 2.0})
    run = json.loads(file.read_text())
    run["rollouts"] |= {"engine": "vllm", "agreement": {"tokens": 0}, "max_staleness": 1}
    run["train"]["on_policy_tokens"] = 6000
    file.write_text(json.dumps(run))
    pace.write_text("0.2")
    driver = Driver(file, cluster)
    driver.until(lambda: "engine 1 joins: 2 engines now" in driver.said())
    driver.until(lambda: figures(driver.run)[-1].get("engines") == 2)
    pace.write_text("0")
    driver.until(lambda: "engine 1 leaves: 1 engines now" in driver.said())
    driver.wait()
    check_run(driver.run)
    scaled = json.loads((driver.run / "cluster.json").read_text())["scaled"]
    assert scaled["more"] >= 1
    assert scaled["fewer"] >= 1
    told = [line for line in figures(driver.run) if "engines" in line]
    assert {line["engines"] for line in told} == {1, 2}
    assert all(0 <= line["starved_seconds"] <= line["training_wait_seconds"] + 1e-9 for line in told)
