"""Where the time goes: every second of a run belongs to one activity; beside it, how long each was busy, and what was waited for."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from bbopd.pipeline.trace import Trace

Clock = Callable[[], float]  # seconds, monotonic

_BEHIND = ("sampling", "scoring")  # of activities in the background, the first one here that is under way gets the second

_SHORTEST_WAIT = 1e-4  # seconds; what takes less is the event loop's own


@dataclass(eq=False, slots=True)
class Activity:
    """Something under way since ``since``; `Timeline.end` ends it."""

    name: str
    since: float
    is_behind: bool
    about: dict[str, Any]


class Timeline:
    """Seconds by activity, and the trace of them.

    Activities in the foreground may nest: the inner one takes its seconds from the outer. Those *behind* go on beside them, and a second
    belongs to one of them only while nothing is in the foreground: to sampling, else to scoring. So `seconds` add up to the time that has
    passed, while `busy_seconds` count each activity for itself.
    """

    def __init__(self, clock: Clock = time.monotonic, seconds: Mapping[str, float] | None = None) -> None:
        self.clock = clock
        self.trace = Trace(clock())
        self._began = self._since = clock()
        self._seconds: defaultdict[str, float] = defaultdict(float, seconds or {})
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._busy_before: Mapping[str, float] = {}
        self._waits: defaultdict[tuple[str, str], float] = defaultdict(float)
        self._under_way: list[Activity] = []

    @contextmanager
    def activity(self, name: str, *, is_behind: bool = False, **about: Any) -> Iterator[None]:
        activity = self.begin(name, is_behind=is_behind, **about)
        try:
            yield
        finally:
            self.end(activity)

    def begin(self, name: str, *, is_behind: bool = False, **about: Any) -> Activity:
        self._settle()
        activity = Activity(name, self._since, is_behind, about)
        self._under_way.append(activity)
        return activity

    def end(self, activity: Activity, *, is_traced: bool = True) -> None:
        self._settle()
        self._under_way.remove(activity)
        if not is_traced:
            return
        name = str(activity.about.pop("span", activity.name))
        self.trace.add(activity.name, name, activity.since, self._since, **activity.about)

    @contextmanager
    def wait(self, stage: str, reason: str) -> Iterator[None]:
        """``stage`` can do nothing, for ``reason``: a span of the trace, unless it took no time to speak of."""
        start = self.clock()
        try:
            yield
        finally:
            self.waited(stage, reason, start)

    def waited(self, stage: str, reason: str, start: float) -> None:
        """As `wait`, once it is over: since ``start``."""
        end = self.clock()
        if end - start > _SHORTEST_WAIT:
            self._waits[stage, reason] += end - start
            self.trace.add(stage, f"wait: {reason}", start, end)

    def carry_on(self, seconds: Mapping[str, float], busy_seconds: Mapping[str, float]) -> None:
        """Add what earlier sessions of the same run have spent; the trace and its figures are of this one alone."""
        for name, value in seconds.items():
            self._seconds[name] += value
        self._busy_before = dict(busy_seconds)

    def seconds(self) -> dict[str, float]:
        self._settle()
        return dict(self._seconds)

    def busy_seconds(self) -> dict[str, float]:
        """Seconds in which an activity was under way, whatever else was: they may add up to more than have passed."""
        self._settle()
        names = sorted({*self._busy, *self._busy_before})
        return {name: self._busy[name] + self._busy_before.get(name, 0.0) for name in names}

    def wait_seconds(self) -> dict[tuple[str, str], float]:
        """By stage and reason, of this session; waits still going on are not in it."""
        return dict(self._waits)

    def items(self, stage: str, *, idle: str = "") -> Items:
        return Items(self, stage, idle)

    @property
    def elapsed(self) -> float:
        return sum(self.seconds().values())

    def to_json(self) -> dict[str, Any]:
        """The content of ``trace.json``, with the figures of this session that its spans were added up to."""
        self._settle()
        waits: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for (stage, reason), seconds in self._waits.items():
            waits[stage][reason] = round(seconds, 4)
        busy = {name: round(seconds, 4) for name, seconds in self._busy.items()}
        return self.trace.to_json({"elapsed_seconds": round(self._since - self._began, 4), "busy_seconds": busy, "wait_seconds": waits})

    def _settle(self) -> None:
        now = self.clock()
        passed = now - self._since
        self._since = now
        self._seconds[self._owner()] += passed
        for name in {activity.name for activity in self._under_way}:
            self._busy[name] += passed

    def _owner(self) -> str:
        foreground = [activity.name for activity in self._under_way if not activity.is_behind]
        if foreground:
            return foreground[-1]
        behind = {activity.name for activity in self._under_way}
        return next((name for name in _BEHIND if name in behind), "other")


class Items:
    """Sequences that are in one stage side by side, each a span of the trace; the stage is busy while there is any.

    Where ``idle`` is given, the time between two of them is a wait for that reason.
    """

    def __init__(self, timeline: Timeline, stage: str, idle: str) -> None:
        self._timeline, self._stage, self._idle = timeline, stage, idle
        self._since: dict[int, float] = {}
        self._busy: Activity | None = None
        self._idle_since = timeline.clock()

    def __len__(self) -> int:
        return len(self._since)

    def enter(self, key: int) -> None:
        if self._busy is None:
            if self._idle:
                self._timeline.waited(self._stage, self._idle, self._idle_since)
            self._busy = self._timeline.begin(self._stage, is_behind=True)
        self._since[key] = self._timeline.clock()

    def leave(self, key: int, name: str, **about: Any) -> None:
        self._timeline.trace.add(self._stage, name, self._since.pop(key), self._timeline.clock(), is_alone=False, **about)
        if not self._since:
            self.close()

    def idle_from_now(self) -> None:
        """What was waited for until now had another reason."""
        self._idle_since = self._timeline.clock()

    def close(self) -> None:
        """Whatever is still in the stage has been given up."""
        self._since.clear()
        if self._busy is not None:
            self._timeline.end(self._busy, is_traced=False)  # the items' own spans say more
            self._busy = None
        self.idle_from_now()
