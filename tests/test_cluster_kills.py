"""Kills at seeded random moments, of every kind of process of a run on Ray: after each the books are right, and nothing is paid for twice
but what was in flight.

Real processes, real Ray, real SIGKILL; the teacher is a table, and the engines speak vLLM's part without vLLM. ``BBOPD_KILLS`` is how
many kills there are, ``BBOPD_KILLS_SEED`` which.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from bbopd.pipeline.state import RunState
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.forked import FOLDER, Program, nursery, programs
from tests.ray_nodes import two_nodes
from tests.test_cluster_runs import check_run, figures
from tests.test_overlap import check_books
from tests.test_ranks import tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
KILLS = int(os.environ.get("BBOPD_KILLS", "12"))
SEED = int(os.environ.get("BBOPD_KILLS_SEED", "0"))
KINDS = {"rank": 5, "teacher": 5, "engine": 3, "engine's process": 3, "host": 2, "driver": 2}
"""How often each is killed, of twenty."""
PER_RUN = 12
LIMIT_S = 240
DRIVER = """
import sys
from bbopd.cluster.driver import Programs, run_on_cluster
from bbopd.config_file import load_config
config, programs = load_config(sys.argv[1]), Programs("tests.forked", "tests.forked", "tests.forked")
sys.exit(run_on_cluster(config, sys.argv[2], lambda text: print(text, end="", flush=True), programs))
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with nursery(tmp_path_factory.mktemp("nursery")), two_nodes(cpus=8) as nodes:
        yield nodes.address


class KilledRun:
    """A run under a driver, and what was seen of it at each kill."""

    def __init__(self, folder: Path, address: str, *, ranks: int, staleness: int) -> None:
        folder.mkdir()
        teacher = folder / "teacher"
        teacher.mkdir()
        run = tiny_run(folder, 1)
        run["teacher"] = {
            "serve": {"model": str(teacher)},
            "prices": {"prompt": 1.0, "answer": 1.0},
            "cache": {"path": str(folder / "cache.db")},
        }
        run["rollouts"] |= {"engine": "vllm", "agreement": {"tokens": 0}, "max_staleness": staleness}
        run["train"] |= {"on_policy_tokens": 2000, "checkpoint_every": 5}
        run["eval"]["every"] = 0
        run["cluster"] = {"ranks": ranks, "engines": 2, "backoff": 0, "max_restarts": 1000, "grace": 20}
        run["output"] = str(folder / "run")
        (folder / "run.yaml").write_text(json.dumps(run))
        self.run, self.paid_log = folder / "run", teacher / "paid.log"
        self.in_doubt: Counter[str] = Counter()
        """Questions that were in flight at a kill, and at how many."""
        self._owners: defaultdict[str, set[str]] = defaultdict(set)  # processes that have been seen to ask a question
        self._file, self._address, self._folder = folder / "run.yaml", address, folder
        self._start()

    def _start(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        with (self._folder / "driver.log").open("ab") as log:
            command = [sys.executable, "-c", DRIVER, str(self._file), self._address]
            self._driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    # ------------------------------------------------------------ how it is

    @property
    def is_over(self) -> bool:
        return self._driver.poll() is not None

    def _is_finished(self) -> bool:
        summary = self.run / "summary.json"
        return summary.exists() and json.loads(summary.read_text())["status"] == "finished"

    def said(self) -> str:
        return (self._folder / "driver.log").read_text(errors="replace")[-8000:]

    def steps(self) -> int:
        lines = self.run / "metrics.jsonl"
        return lines.read_text().count("\n") if lines.exists() else 0

    def until(self, is_true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not is_true():
            assert time.monotonic() < deadline, self.said()
            self.in_flight()
            time.sleep(0.02)

    def rest(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        self.until(lambda: time.monotonic() >= end)

    def state(self) -> RunState | None:
        """As the last checkpoint has it; None before the first."""
        while (latest := latest_checkpoint(self.run / "checkpoints")) is not None:
            with suppress(FileNotFoundError):  # newer ones have come, and it is removed
                return RunState.from_json(json.loads((latest / "state.json").read_text())["state"])
        return None

    def in_flight(self) -> set[str]:
        """Questions that the ledger lists: asked, and not answered so far."""
        with closing(sqlite3.connect(self._folder / "cache.db", timeout=60)) as ledger:
            known = ledger.execute("SELECT 1 FROM sqlite_master WHERE name='asked'").fetchone()
            asked = {key.hex(): owner for key, owner in ledger.execute("SELECT key, owner FROM asked")} if known else {}
        for key, owner in asked.items():
            self._owners[key].add(owner)
        return set(asked)

    # ------------------------------------------------------------ what is done to it

    def kill(self, kind: str, rng: random.Random) -> bool:
        """SIGKILL to one process of this kind; whether there was one."""
        running = [program for program in programs(Path(os.environ[FOLDER])) if self._is_ours(program)]
        victims = {
            "rank": [program.pid for program in running if program.words[0] == "distill"],
            "teacher": [program.pid for program in running if program.words[0] == "serve"],
            "engine": [program.pid for program in running if program.words[0] == "sample-server"],
            "engine's process": [child for program in running if program.words[0] == "sample-server" for child in children(program.pid)],
            "host": [host for program in running if is_worker(host := parent(parent(program.parent)))],  # of a ward: two processes
            "driver": [self._driver.pid],
        }[kind]
        if not victims or self.is_over:
            return False
        doubtful = self.in_flight()
        with suppress(ProcessLookupError):
            os.kill(rng.choice(victims), signal.SIGKILL)
        doubtful |= self.in_flight()
        if kind == "driver":
            self._driver.wait()
            self.until(lambda: not any(self._is_ours(program) for program in programs(Path(os.environ[FOLDER]))))
            doubtful |= self.in_flight()
            if not self._is_finished():
                self._start()
        self.in_doubt.update(doubtful)
        return True

    def _is_ours(self, program: Program) -> bool:
        """Runs follow each other, so the others' end soon."""
        return program.words[0] != "distill" or str(self.run) in " ".join(program.words)

    # ------------------------------------------------------------ what is right

    def check(self) -> None:
        """The books, and what was paid, as they are now."""
        state = self.state()
        if state is not None:
            check_books(state)
        paid = Counter(self.paid_log.read_text().split()) if self.paid_log.exists() else Counter()
        twice = {key: times for key, times in paid.items() if times > max(1, len(self._owners[key])) + self.in_doubt[key]}
        assert not twice, f"paid again, though not in flight at a kill, nor when a process that asked ended: {twice}"

    def finish(self) -> list[dict[str, Any]]:
        """Wait for its end, which is a good one; its figures."""
        self.until(lambda: self.is_over)
        assert self._is_finished(), self.said()
        check_run(self.run)
        self.check()
        return figures(self.run)


def children(pid: int) -> list[int]:
    with suppress(FileNotFoundError, ProcessLookupError):
        return [int(word) for task in Path(f"/proc/{pid}/task").iterdir() for word in (task / "children").read_text().split()]
    return []


def parent(pid: int) -> int:
    """0 where there is no such process any more."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def is_worker(pid: int) -> bool:
    """Whether it is one of Ray's: a ward whose worker has ended is a child of whatever takes in orphans, which is nobody's to kill."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::")
    return False


def test_whatever_is_killed_whenever_nothing_is_lost_or_paid_for_twice(cluster: str, tmp_path: Path) -> None:
    rng, killed, ours = random.Random(SEED), Counter[str](), []
    while killed.total() < KILLS:
        ranks, staleness = ((2, 0), (1, 1))[len(ours) % 2]
        run = KilledRun(tmp_path / f"run-{len(ours)}", cluster, ranks=ranks, staleness=staleness)
        most = killed.total() + PER_RUN
        while not run.is_over and killed.total() < min(KILLS, most):
            if rng.random() < 0.75:  # else while it recovers from the last kill
                before = run.steps()
                run.until(lambda run=run, before=before: run.steps() > before or run.is_over)  # type: ignore[misc]
            run.rest(rng.uniform(0.0, 0.5))
            (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
            if run.kill(kind, rng):
                killed[kind] += 1
                run.check()
                print(f"{time.strftime('%X')} kill {killed.total()}: {kind}, at step {run.steps()} of run {len(ours)}", flush=True)
        ours.append(run.finish())
    undisturbed = KilledRun(tmp_path / "undisturbed", cluster, ranks=2, staleness=0).finish()
    for killed_run in ours[::2]:
        for line, expected in zip(killed_run, undisturbed, strict=True):
            assert line["loss"] == pytest.approx(expected["loss"], rel=1e-4)
            assert (line["tokens"], line["rollout_tokens"]) == (expected["tokens"], expected["rollout_tokens"])
    print(f"{killed.total()} kills in {len(ours)} runs: {dict(killed)}")
