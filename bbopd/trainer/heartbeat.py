"""Signs of life of the processes that train together, so that one that answers no more is named, and no other waits for it without end."""

from __future__ import annotations

import json
import threading
import time

import torch.distributed as dist

from bbopd.errors import RankError

_MOST_SECONDS = 5.0
_NAMED = 8


class Heartbeat:
    """Tells the other ranks in the store, from a thread of its own, that this one lives and what it does; and hears the same of them.

    A rank is lost when it has not been heard of for 0.8 of ``timeout`` seconds, before the collectives' own time is up: then it is named.
    ``store`` is used by nobody else.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, timeout: float) -> None:
        self.interval = min(_MOST_SECONDS, timeout / 20)
        """Seconds between two beats."""
        self._rank, self._store, self._timeout = rank, store, timeout
        self._others = {other: f"beat/{other}" for other in range(size) if other != rank}
        now = time.monotonic()
        self._round = now  # the last one that the store took part in
        self._heard = dict.fromkeys(self._others, now)
        self._said: dict[int, list[object]] = {}
        self._doing, self._since = "starting", now
        self._is_over = threading.Event()
        threading.Thread(target=self._beat, name="bbopd-heartbeat", daemon=True).start()

    def doing(self, what: str) -> None:
        """What this rank is doing from now on, for the others to say should it be lost."""
        self._doing, self._since = what, time.monotonic()

    def end(self) -> None:
        self._is_over.set()

    @property
    def is_cut_off(self) -> bool:
        """Whether the store no longer answers."""
        return time.monotonic() - self._round > 0.8 * self._timeout

    def require_all(self) -> None:
        """Raises `RankError` where another rank is lost, by its number and what it was doing, or the store."""
        if self._others and self.is_cut_off:
            raise RankError(
                f"the store that all ranks met by has not answered rank {self._rank} within train.parallel.timeout ({self._timeout} s): "
                f"{self._of(0)}, if it is rank 0 that holds it; the same command goes on from the last checkpoint"
            )
        now = time.monotonic()
        for other, heard in self._heard.items():
            if now - heard > 0.8 * self._timeout:
                raise RankError(
                    f"{self._of(other)}, so it is taken for lost (train.parallel.timeout {self._timeout} s); the same command goes on from "
                    "the last checkpoint"
                )

    def suspects(self) -> str:
        """Who may have held up a collective: those that are silent, or else what all others are doing."""
        now = time.monotonic()
        silent = [other for other, heard in self._heard.items() if now - heard > 3 * self.interval]
        return "; ".join(self._of(other) for other in (silent or list(self._heard))[:_NAMED])

    def _of(self, other: int) -> str:
        if other not in self._heard:
            return f"rank {other} is this one"
        silent = time.monotonic() - self._heard[other]
        _, doing, seconds = self._said.get(other, [0, "starting", 0.0])
        if silent > 3 * self.interval:
            return f"rank {other} has not been heard of for {silent:.0f} s, and was {doing}"
        return f"rank {other} has been {doing} for {seconds:.0f} s"

    def _beat(self) -> None:
        count = 0
        try:
            while not self._is_over.wait(self.interval if count else 0.0):
                count += 1
                beat = [count, self._doing, round(time.monotonic() - self._since, 1)]
                self._store.set(f"beat/{self._rank}", json.dumps(beat))
                for other, key in self._others.items():
                    if self._store.check([key]) and (said := json.loads(self._store.get(key)))[0] != self._said.get(other, [0])[0]:
                        self._said[other] = said
                        self._heard[other] = time.monotonic()
                self._round = time.monotonic()
        except RuntimeError:  # the store has ended: so has the run, or whoever held it
            return
