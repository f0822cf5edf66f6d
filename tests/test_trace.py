"""The timeline and its trace: seconds that add up while activities overlap, and a file in the Trace Event Format, bounded in size."""

from __future__ import annotations

import json
from collections import Counter

from bbopd.pipeline.timing import Timeline
from bbopd.pipeline.trace import Trace
from tests.loop_rig import Rig, run_config


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def check_events(events: list[dict]) -> None:
    """What a reader of the format relies on: known phases, non-negative durations, pairs of "b" and "e", spans of a lane that nest."""
    assert {event["ph"] for event in events} <= {"X", "M", "b", "e"}
    named = {event["tid"] for event in events if event["name"] == "thread_name"}
    assert {event["tid"] for event in events if event["ph"] != "M"} <= named
    begun = {(event["cat"], event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "b"}
    ended = {(event["cat"], event["id"], event["name"]): event["ts"] for event in events if event["ph"] == "e"}
    assert begun.keys() == ended.keys()
    assert all(ended[key] >= begun[key] >= 0 for key in begun)
    for lane in named:
        open_until: list[float] = []
        spans = sorted((e["ts"], -e["dur"]) for e in events if e["ph"] == "X" and e["tid"] == lane)
        for start, minus_duration in spans:
            assert start >= 0
            assert minus_duration <= 0
            while open_until and open_until[-1] <= start + 0.2:  # times are rounded to 0.1 microseconds
                open_until.pop()
            assert not open_until or start - minus_duration <= open_until[-1] + 0.2, "a span ends after the one that holds it"
            open_until.append(start - minus_duration)


def test_seconds_add_up_while_activities_overlap() -> None:
    clock = Clock()
    timeline = Timeline(clock)
    sampled, scored = timeline.items("sampling"), timeline.items("scoring")
    sampled.enter(0)
    clock.now += 1  # sampling alone
    scored.enter(7)
    clock.now += 2  # sampling and scoring
    with timeline.activity("training"):
        clock.now += 4  # all three
        sampled.leave(0, "p0#0", tokens=3)
        clock.now += 8  # scoring and training
    clock.now += 16  # scoring alone
    with timeline.wait("training", "no batch is ready"):
        clock.now += 32
    scored.leave(7, "p0#7")
    clock.now += 64
    assert timeline.seconds() == {"other": 64.0, "sampling": 3.0, "training": 12.0, "scoring": 48.0}
    assert timeline.busy_seconds() == {"sampling": 7.0, "scoring": 62.0, "training": 12.0}
    assert timeline.wait_seconds() == {("training", "no batch is ready"): 32.0}
    assert timeline.elapsed == 127.0
    content = timeline.to_json()
    assert content["otherData"]["elapsed_seconds"] == 127.0
    check_events(content["traceEvents"])


def test_a_long_trace_keeps_its_beginning_and_its_end() -> None:
    trace = Trace(0.0, limit=100)
    for number in range(1000):
        trace.add("training", f"step {number}", number, number + 1)
    assert [span.name for span in trace.spans()] == [f"step {n}" for n in (*range(50), *range(950, 1000))]
    assert trace.to_json({})["otherData"]["dropped_spans"] == 900


async def test_a_run_leaves_the_trace_of_what_it_did(tmp_path) -> None:
    rig = Rig(run_config(tmp_path / "run"))
    assert await rig.run() == "finished"
    content = json.loads((tmp_path / "run" / "trace.json").read_text())
    events = content["traceEvents"]
    check_events(events)
    steps = [event["args"] for event in events if event["ph"] == "X" and event["name"] == "training"]
    lines = rig.folder.read_lines("metrics.jsonl")
    assert [step["tokens"] for step in steps] == [line["tokens"] for line in lines]
    tokens = Counter()
    for event in events:
        if event["ph"] == "b":
            tokens[event["cat"]] += event["args"]["tokens"]
    assert tokens == {"sampling": rig.loop.state.sampled_tokens, "scoring": rig.loop.state.scored_tokens}


def test_every_second_belongs_to_one_activity():
    now = [0.0]
    timeline = Timeline(lambda: now[0])
    with timeline.activity("training"):
        now[0] += 3
        with timeline.activity("saving"):
            now[0] += 2
        now[0] += 1
    now[0] += 4
    assert timeline.seconds() == {"other": 4.0, "training": 4.0, "saving": 2.0}
    assert timeline.elapsed == 10.0
