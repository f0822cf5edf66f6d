"""What befell a run on its cluster: ``cluster.json`` in its folder, kept over all of its drivers."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from bbopd.pipeline.folder import RunFolder

_NAME = "cluster.json"
_KEPT = 1000
KINDS = ("ranks", "teachers", "engines")


class ClusterRecord:
    """Restarts, counted by kind, changes of the number of engines, and drivers; with the last events in words. Each is on disk at once."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        known: dict[str, Any] = folder.read_json(_NAME) or {}
        self._restarts = {kind: known.get("restarts", {}).get(kind, 0) for kind in KINDS}
        self._scaled = {way: known.get("scaled", {}).get(way, 0) for way in ("more", "fewer")}
        self._drivers: int = known.get("drivers", 0) + 1
        self._events: list[dict[str, str]] = known.get("events", [])
        self._write()

    def restarted(self, kind: str, text: str) -> None:
        self._restarts[kind] += 1
        self.note(text)

    def scaled(self, way: str, text: str) -> None:
        self._scaled[way] += 1
        self.note(text)

    def note(self, text: str) -> None:
        self._events.append({"at": datetime.now().astimezone().isoformat(timespec="seconds"), "what": text})
        self._write()

    def _write(self) -> None:
        known = {"restarts": self._restarts, "scaled": self._scaled, "drivers": self._drivers, "events": self._events[-_KEPT:]}
        self._folder.write_json(_NAME, known)
