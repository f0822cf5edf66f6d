"""A run whose student writes in two servers of the real vLLM: one is killed, the other goes on, and then the one that was started again."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bbopd.pipeline.state import RunState
from bbopd.rpc.run_server import write_whole
from bbopd.teachers.fake import FakeBackend
from bbopd.trainer.checkpoint import latest_checkpoint
from bbopd.types import Rollout, SignalSpec, TeacherSignal
from tests.cli_runs import WORDS, environment, steps, write_config
from tests.serving import serving
from tests.test_overlap import check_books
from tests.tiny_models import save_folder, tiny_llama, tiny_tokenizer

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
    pytest.mark.timeout(600),
]
LIMIT_S = 240
TOKENS = 240


class HeldBackend(FakeBackend):
    """A teacher that answers while ``may_answer`` is set, so that the run waits for what is done to its engines."""

    def __init__(self) -> None:
        super().__init__(262)
        self.may_answer = threading.Event()

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        assert self.may_answer.wait(LIMIT_S)
        return super().score(rollouts, want)


class EngineServers:
    """``bbopd sample-server`` processes, and the file in which the run finds those that are listed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "engines.txt"
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, port: int = 0) -> None:
        ready = self.folder / name
        ready.unlink(missing_ok=True)
        words = ["sample-server", "--port", str(port), "--ready-file", str(ready)]
        with (self.folder / f"{name}.log").open("ab") as log:
            command = [sys.executable, "-m", "bbopd", *words]
            self.running[name] = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)

    def target(self, name: str) -> str:
        until(lambda: (self.folder / name).exists())
        return (self.folder / name).read_text().strip()

    def list(self, *names: str) -> None:
        write_whole(self.file, "".join(f"{self.target(name)}\n" for name in names))

    def kill(self, name: str) -> None:
        process = self.running.pop(name)
        process.kill()
        process.wait()

    def end(self) -> None:
        for process in self.running.values():
            process.send_signal(signal.SIGTERM)
        for process in self.running.values():
            process.wait(60)


def until(is_true: Callable[[], Any]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[EngineServers]:
    found = EngineServers(tmp_path)
    with contextlib.ExitStack() as stack:
        stack.callback(found.end)
        for name in ("one", "two"):
            found.start(name)
        yield found


def test_a_killed_vllm_is_made_up_for_by_the_other_and_comes_back(servers: EngineServers, tmp_path: Path) -> None:
    save_folder(tmp_path / "model", tiny_llama(vocab_size=262, layers=4, hidden=128), tiny_tokenizer())  # heads as wide as vLLM takes
    (tmp_path / "corpus.txt").write_text(
        "\n\n\n".join(" ".join(WORDS[(i + j * (i % 5 + 1)) % len(WORDS)] for j in range(80)) for i in range(40))
    )
    teacher = HeldBackend()
    with serving(teacher) as [served], (tmp_path / "run.log").open("wb") as log:
        path = write_config(
            tmp_path,
            tmp_path / "model",
            tmp_path / "corpus.txt",
            student={"dtype": "float32"},
            teacher={"serve": None, "target": served.target, "timeout": 600},
            rollouts={
                "engine": "vllm",
                "targets_file": str(servers.file),
                "agreement": {"tokens": 64},
                "max_new_tokens": 8,
                "max_staleness": 1,
            },
            train={"on_policy_tokens": TOKENS, "cold_start_tokens": 0},
            eval={"sequences": 1, "rollouts": 1, "max_new_tokens": 2},
        )
        servers.list("one", "two")
        process = subprocess.Popen(
            [sys.executable, "-m", "bbopd", "distill", str(path), "--plain"], env=environment(), stdout=log, stderr=log
        )
        run = tmp_path / "run"

        def cycles(count: int) -> None:
            """So many more cycles, each with a push of weights."""
            begun = pushes(run)
            until(lambda: pushes(run) >= begun + count or process.poll() is not None)
            assert process.poll() is None, said()

        def said() -> str:
            return (tmp_path / "run.log").read_text(errors="replace")

        def hear(text: str) -> None:
            until(lambda: text in said() or process.poll() is not None)
            assert text in said(), said()

        try:
            hear("2 now")
            teacher.may_answer.set()
            cycles(2)
            one, port = servers.target("one"), int(servers.target("one").rpartition(":")[2])
            servers.kill("one")
            hear(f"the engine at {one} is gone")
            cycles(2)
            teacher.may_answer.clear()
            servers.start("one", port)
            until(lambda: said().count(f"an engine writes at {one}: ") == 2)
            servers.list("one")
            hear("it is no more in the list")
            teacher.may_answer.set()
            cycles(2)
            assert process.wait(LIMIT_S) == 0, said()
        finally:
            teacher.may_answer.set()
            process.kill()
            process.wait()
    state = RunState.from_json(json.loads((latest_checkpoint(run / "checkpoints") / "state.json").read_text())["state"])
    check_books(state)
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, state.step + 1))
    assert sum(line["rollout_tokens"] for line in lines) == state.on_policy_tokens >= TOKENS
    measured = [line["engine_difference_max"] for line in lines if "engine_difference_max" in line]
    assert len(measured) >= 6, "all engines had the weights of every push"
    assert 0 < max(measured) < 1e-3


def pushes(run: Path) -> int:
    return sum("push_seconds" in line for line in steps(run)) if (run / "metrics.jsonl").exists() else 0
