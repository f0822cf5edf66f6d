"""What happened when, as a trace that Perfetto (https://ui.perfetto.dev) and chrome://tracing open.

The Trace Event Format: https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU. A lane is a thread there, a span on
it a complete event ("X"); what overlaps with its like, such as rollouts being written side by side, is an asynchronous one ("b", "e").
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

LANES = ("sampling", "scoring", "training", "weights", "saving", "evaluation", "loading")
"""In the order of drawing; others follow."""


@dataclass(frozen=True, slots=True)
class Span:
    """``start`` and ``end`` in seconds of the clock; ``is_alone`` ones never overlap with another of their lane unless they nest."""

    lane: str
    name: str
    start: float
    end: float
    is_alone: bool
    about: Mapping[str, Any]


class Trace:
    """Keeps the first and the last spans of a run, ``limit`` in all, so that a long run's file stays small.

    Parameters
    ----------
    start : seconds of the clock that the trace calls 0.
    """

    def __init__(self, start: float, *, limit: int = 20_000) -> None:
        self.dropped = 0
        """Spans from the middle of the run that are not kept."""
        self._start = start
        self._first: list[Span] = []
        self._last: deque[Span] = deque(maxlen=limit - limit // 2)
        self._room_for_first = limit // 2

    def add(self, lane: str, name: str, start: float, end: float, *, is_alone: bool = True, **about: Any) -> None:
        span = Span(lane, name, start, end, is_alone, about)
        if len(self._first) < self._room_for_first:
            self._first.append(span)
            return
        self.dropped += len(self._last) == self._last.maxlen
        self._last.append(span)

    def spans(self) -> list[Span]:
        return [*self._first, *self._last]

    def to_json(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """The JSON Object Format; ``about`` is kept beside the events. Times are microseconds from the trace's start."""
        spans = self.spans()
        found = {span.lane for span in spans}
        lanes = [lane for lane in LANES if lane in found] + sorted(found - set(LANES))
        threads = {lane: number for number, lane in enumerate(lanes, 1)}
        events: list[dict[str, Any]] = [{"ph": "M", "pid": 1, "tid": 0, "name": "process_name", "args": {"name": "bbopd"}}]
        for lane, number in threads.items():
            events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_name", "args": {"name": lane}})
            events.append({"ph": "M", "pid": 1, "tid": number, "name": "thread_sort_index", "args": {"sort_index": number}})
        numbers = count(1)
        for span in spans:
            common = {"pid": 1, "tid": threads[span.lane], "cat": span.lane, "name": span.name}
            start, end = self._microseconds(span.start), self._microseconds(span.end)
            if span.is_alone:
                events.append({"ph": "X", **common, "ts": start, "dur": round(end - start, 1), "args": dict(span.about)})
                continue
            number = next(numbers)
            events.append({"ph": "b", **common, "id": number, "ts": start, "args": dict(span.about)})
            events.append({"ph": "e", **common, "id": number, "ts": end})
        return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {**about, "dropped_spans": self.dropped}}

    def _microseconds(self, seconds: float) -> float:
        return round((seconds - self._start) * 1e6, 1)


def read_spans(trace: Mapping[str, Any]) -> list[Span]:
    """The spans of a trace in the Trace Event Format; asynchronous ones are put together from their two events."""
    events: Sequence[Mapping[str, Any]] = trace.get("traceEvents") or ()
    spans, begun = [], {}
    for event in events:
        if event["ph"] == "X":
            start, seconds = event["ts"] / 1e6, event["dur"] / 1e6
            spans.append(Span(event["cat"], event["name"], start, start + seconds, True, event["args"]))
        elif event["ph"] == "b":
            begun[event["cat"], event["id"]] = event
        elif event["ph"] == "e" and (first := begun.pop((event["cat"], event["id"]), None)) is not None:
            spans.append(Span(event["cat"], event["name"], first["ts"] / 1e6, event["ts"] / 1e6, False, first["args"]))
    return spans
