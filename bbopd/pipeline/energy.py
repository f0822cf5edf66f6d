"""What a run's machine has drawn, in joules, where it counts: processor and memory by RAPL, NVIDIA GPUs by NVML.

The counters are the machine's, so whatever else runs on it is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

_POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, slots=True)
class Counter:
    """``read`` gives joules that only rise, and begin again at 0 after ``wraps_at`` (0: never)."""

    name: str
    read: Callable[[], float]
    wraps_at: float = 0.0


class EnergyMeter:
    """Adds up what ``counters`` have risen by since the meter was made, on top of ``joules``; to be read more often than they wrap."""

    def __init__(self, counters: Sequence[Counter], *, joules: float = 0.0) -> None:
        self.covers = tuple(counter.name for counter in counters)
        self._counters = list(counters)
        self._joules = joules
        self._last = [counter.read() for counter in counters]

    def joules(self) -> float | None:
        """None where nothing is counted."""
        for index, counter in enumerate(self._counters):
            now = counter.read()
            self._joules += now - self._last[index] + (counter.wraps_at if now < self._last[index] else 0.0)
            self._last[index] = now
        return self._joules if self._counters else None


def energy_counters(powercap: Path = _POWERCAP) -> list[Counter]:
    """Those of this machine that may be read; reading RAPL is root's alone on most."""
    return [*_rapl(powercap), *_nvml()]


def _rapl(powercap: Path) -> list[Counter]:
    """Packages, and memory that they do not include; their cores are part of them."""
    counters = []
    for zone in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = (zone / "name").read_text().strip()
            if not name.startswith(("package", "dram")):
                continue
            wraps_at = int((zone / "max_energy_range_uj").read_text()) / 1e6
            counter = Counter(f"{name} ({zone.name})", _microjoules(zone / "energy_uj"), wraps_at)
            counter.read()
        except (OSError, ValueError):
            continue
        counters.append(counter)
    return counters


def _microjoules(path: Path) -> Callable[[], float]:
    return lambda: int(path.read_text()) / 1e6


def _nvml() -> list[Counter]:
    """The GPUs that torch sees, where the package nvidia-ml-py is there to ask."""
    import torch

    if find_spec("pynvml") is None or not torch.cuda.is_available():
        return []
    import pynvml

    counters = []
    try:
        pynvml.nvmlInit()
        for index in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(index)
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{about.uuid}")
            counter = Counter(f"{about.name} {index}", _millijoules(pynvml, handle))
            counter.read()
            counters.append(counter)
    except pynvml.NVMLError:
        return counters
    return counters


def _millijoules(pynvml: object, handle: object) -> Callable[[], float]:
    total = pynvml.nvmlDeviceGetTotalEnergyConsumption  # type: ignore[attr-defined]
    return lambda: total(handle) / 1e3
