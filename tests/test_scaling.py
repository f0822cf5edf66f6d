"""How many engines a run wants by what it waits for: the decision, and the figures that it is made from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from bbopd.cluster.scaling import Scaler, Window, wanted_engines
from bbopd.config import ScaleConfig
from bbopd.pipeline.folder import RunFolder
from tests.loop_rig import run_config

SCALE = ScaleConfig()
STARVED, BALANCED, IDLE = Window(60, 20, 0), Window(60, 2, 10), Window(60, 0, 45)


@pytest.mark.parametrize(
    ("windows", "engines", "wanted"),
    [
        ([], 4, 4),
        ([STARVED], 4, 4),  # one window may be chance
        ([STARVED, STARVED], 4, 6),  # 4 / (1 - 1/3)
        ([STARVED, Window(60, 7, 0)], 4, 5),  # by as little as either asks for
        ([Window(60, 59, 0)] * 2, 4, 8),  # no more than twice as many at once
        ([STARVED] * 2, 7, 8),  # no more than are allowed
        ([STARVED, BALANCED], 4, 4),
        ([BALANCED, STARVED], 4, 4),
        ([STARVED, IDLE], 4, 4),
        ([IDLE, IDLE], 4, 2),  # busy a quarter of the time: 4 * 0.25 / 0.7, rounded up
        ([IDLE, IDLE], 1, 1),
        ([IDLE, Window(60, 0, 25)], 4, 4),  # busy for 35 of 60 seconds: three would be busier than 70%
        ([Window(60, 0, 18)] * 2, 4, 4),  # as busy as they are to be
        ([Window(60, 0, 60)] * 2, 4, 1),  # at least so many
        ([Window(60, 20, 30)] * 2, 4, 4),  # both wait: for a straggler, or a teacher, and engines are of no help
        ([Window(60, 4, 45)] * 2, 4, 4),  # between the thresholds
        ([STARVED] * 5 + [IDLE] * 2, 4, 2),
    ],
)
def test_more_for_a_trainer_that_waits_and_fewer_for_engines_that_do(windows: list[Window], engines: int, wanted: int) -> None:
    assert wanted_engines(windows, engines, SCALE, most=8) == wanted


def test_a_change_is_never_answered_by_its_opposite() -> None:
    """With twice the engines a window has half of the work left for each; what follows from that is no way back."""
    for engines in range(1, 9):
        for work in range(1, 200):  # hundredths of the trainer's time that one engine would take to write

            def window(engines: int, work: int = work) -> Window:
                write = work / 100 / engines
                cycle = max(1.0, write)
                return Window(cycle, cycle - 1.0, cycle - write)

            ways, now = [], engines
            for _ in range(8):
                wanted = wanted_engines([window(now)] * 2, now, SCALE, most=16)
                ways.append((wanted > now) - (wanted < now))
                now = wanted
            assert not {1, -1} <= set(ways), (engines, work, ways)
            assert ways[-1] == 0, "it settles"


def line(step: int, elapsed: float, *, engines: int, starved: float = 0.0, idle: float = 0.0) -> str:
    figures = {"step": step, "elapsed": elapsed, "engines": engines, "starved_seconds": starved, "sampling_wait_seconds": idle}
    return json.dumps(figures) + "\n"


@pytest.fixture
def scaling() -> Iterator[Callable[[Path], Scaler]]:
    with ExitStack() as stack:

        def begin(file: Path) -> Scaler:
            scaler = Scaler(file, ScaleConfig(window=10), most=8)
            stack.callback(scaler.close)
            return scaler

        yield begin


def test_only_what_was_measured_with_all_engines_counts(scaling: Callable[[Path], Scaler], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    scaler = scaling(file)
    assert scaler.wanted(2) == 2, "before the first update there is nothing to read"
    file.write_text(json.dumps({"step": 1, "elapsed": 1.0}) + "\n")  # of a cold start
    with file.open("a") as lines:
        for step in range(2, 8):
            lines.write(line(step, 5.0 * step, engines=1, starved=4.0))  # one of the two is not there yet
        lines.flush()
        assert scaler.wanted(2) == 2
        assert scaler.last is None
        for step in range(8, 12):
            lines.write(line(step, 5.0 * step, engines=2, starved=2.0))
        lines.write(line(12, 60.0, engines=2)[:20])
        lines.flush()
        assert scaler.last is None
        assert scaler.wanted(2) == 4
        assert scaler.last == Window(10.0, 4.0, 0.0)
        assert scaler.wanted(4) == 4, "nothing has been measured of four"


def test_a_run_that_goes_back_is_measured_on_from_where_it_was(scaling: Callable[[Path], Scaler], tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    scaler = scaling(file)
    file.write_text("".join(line(step, 5.0 * step, engines=2, starved=2.0) for step in range(1, 4)))
    assert scaler.wanted(2) == 2
    assert scaler.last == Window(10.0, 4.0, 0.0)
    RunFolder(tmp_path).rewind("metrics.jsonl", 1)
    with file.open("a") as lines:
        for step in range(2, 6):
            lines.write(line(step, 100.0 + 5.0 * step, engines=2, idle=4.0))
    assert scaler.wanted(2) == 2, "steps 2 and 3 are known, and those after them began far from where they ended"
    assert scaler.last == Window(10.0, 4.0, 0.0)
    with file.open("a") as lines:
        lines.write(line(6, 130.0, engines=2, idle=4.0))
        lines.write(line(7, 135.0, engines=2, idle=4.0))
    assert scaler.wanted(2) == 2
    assert scaler.last == Window(10.0, 0.0, 8.0)


def test_what_cannot_be_scaled_is_refused(tmp_path: Path) -> None:
    vllm = {"engine": "vllm", "max_staleness": 1}
    assert run_config(tmp_path, rollouts=vllm, cluster={"engines": [2, 4], "scale": {}}).cluster.scale == SCALE
    for engines, scale in ((2, {"least": 2}), ([2, 4], {"least": 3}), (0, {})):
        with pytest.raises(ValueError, match=r"it needs cluster\.engines="):
            run_config(tmp_path, rollouts=vllm, cluster={"engines": engines, "scale": scale})
    with pytest.raises(ValueError, match="set max_staleness=1, or leave scale out"):
        run_config(tmp_path, rollouts=vllm | {"max_staleness": 0}, cluster={"engines": [2, 4], "scale": {}})
