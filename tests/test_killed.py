"""Every sequence drawn ends as trained, rejected or pending, however often the process is killed: each engine, in turn and overlapping."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bbopd.pipeline.state import RunState
from bbopd.trainer.checkpoint import latest_checkpoint
from tests.test_overlap import check_books

# forks for every run, so that imports take their time once; it must be without threads of its own
RUNS = """
import asyncio, json, os, signal, sys, threading, time, warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from bbopd.rollouts.fake import FakeEngine
from tests.loop_rig import VOCAB, Rig, run_config

def die_after(lines, path):
    while not path.exists() or path.read_text().count("\\n") < lines:
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)

warnings.simplefilter("ignore")  # Python warns of any fork
for line in sys.stdin:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print("over", flush=True)
        continue
    asked = json.loads(line)
    if asked["lines"]:
        threading.Thread(target=die_after, args=(asked["lines"], Path(asked["folder"]) / "metrics.jsonl"), daemon=True).start()
    config = run_config(
        Path(asked["folder"]),
        train={"on_policy_tokens": 800, "checkpoint_every": 3},
        rollouts={"max_staleness": asked["staleness"], "samples_per_prompt": 3},
    )
    engine = FakeEngine(VOCAB, eos_token_id=2, delay=0.002) if asked["engine"] == "fake" else None
    with ThreadPoolExecutor(1) if asked["overlaps"] else nullcontext() as executor:
        rig = Rig(config, engine=engine, executor=executor, min_tokens=12)
        print(asyncio.run(rig.run()), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def runs() -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    with subprocess.Popen(
        [sys.executable, "-c", RUNS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.mark.parametrize(
    ("engine", "staleness", "overlaps"),
    [("fake", 0, False), ("fake", 1, True), ("hf", 0, False), ("hf", 1, False)],
    ids=["in turn", "overlapping", "hf in turn", "hf streamed"],
)
def test_nothing_is_lost_when_the_process_is_killed(runs, tmp_path, engine: str, staleness: int, overlaps: bool) -> None:
    run = tmp_path / "run"
    asked = {"folder": str(run), "engine": engine, "staleness": staleness, "overlaps": overlaps}
    for lines in (6, 12):  # soon after the cold start, and later on, from what the first kill has left
        _begin(runs, asked | {"lines": lines})
        assert runs.stdout.readline() == "over\n", "it has ended before it was killed"
        check_books(_saved(run))
    _begin(runs, asked | {"lines": 0})
    assert runs.stdout.readline() == "finished\n"
    assert runs.stdout.readline() == "over\n"
    state = _saved(run)
    check_books(state)
    assert sum(state.rejected.values()) > 0
    assert bool(state.pending) == overlaps, "only what overlaps leaves sequences under way"
    given = 3 * state.position["prompts"] + state.position["labelled"]  # every prompt that the stream gave out was drawn
    places_dropped = 2 * state.cycle  # the last prompt of a cycle is asked fewer times where three do not fit
    assert given - places_dropped <= state.drawn <= given
    trained = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in trained] == list(range(1, state.step + 1))
    assert sum(line["rollout_tokens"] for line in trained) == state.on_policy_tokens
    assert sum(line["tokens"] for line in trained) == state.trained_tokens


def _begin(runs: Any, asked: dict[str, Any]) -> None:
    """Start a run, which kills itself once it has written so many ``lines``; 0: never."""
    runs.stdin.write(json.dumps(asked) + "\n")
    runs.stdin.flush()


def _saved(run: Path) -> RunState:
    return RunState.from_json(json.loads((latest_checkpoint(run / "checkpoints") / "state.json").read_text())["state"])
