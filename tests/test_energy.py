"""Energy counters: added up over wraps and sessions, and left out where they cannot be read."""

from __future__ import annotations

from pathlib import Path

from bbopd.pipeline.energy import Counter, EnergyMeter, energy_counters
from bbopd.pipeline.folder import RunFolder
from bbopd.pipeline.metrics import RunMetrics


def zone(root: Path, folder: str, name: str, microjoules: int | str = 0, wraps_at: int = 1_000_000) -> Path:
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(name + "\n")
    (path / "max_energy_range_uj").write_text(f"{wraps_at}\n")
    (path / "energy_uj").write_text(f"{microjoules}\n")
    return path


def test_packages_and_memory_count_and_cores_do_not(tmp_path: Path) -> None:
    package = zone(tmp_path, "intel-rapl:0", "package-0", 900_000)
    memory = zone(tmp_path, "intel-rapl:0:1", "dram", 100)
    zone(tmp_path, "intel-rapl:0:0", "core", 5)
    zone(tmp_path, "intel-rapl:1", "package-1", "not a number")
    counters = energy_counters(tmp_path)
    assert [counter.name for counter in counters] == ["package-0 (intel-rapl:0)", "dram (intel-rapl:0:1)"]
    meter = EnergyMeter(counters, joules=10.0)
    assert meter.joules() == 10.0
    (package / "energy_uj").write_text("950000")
    (memory / "energy_uj").write_text("200100")
    assert meter.joules() == 10.25
    (package / "energy_uj").write_text("50000")  # it has begun again at 0
    assert round(meter.joules() or 0.0, 6) == 10.35


def test_machine_without_counters(tmp_path: Path) -> None:
    assert energy_counters(tmp_path / "nothing") == []
    assert EnergyMeter([]).joules() is None


def test_energy_of_a_run_goes_on_from_its_last_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    metrics = RunMetrics(folder, from_step=0, counters=[Counter("a clock", iter([0.0, 2.5, 4.0]).__next__)])
    for step in (1, 2):
        metrics.step({"step": step})
    metrics.close()
    assert [line["energy_joules"] for line in folder.read_lines("metrics.jsonl")] == [2.5, 4.0]
    again = RunMetrics(folder, from_step=1, counters=[Counter("a clock", iter([7.0, 8.0]).__next__)])
    again.step({"step": 2})  # made again
    again.close()
    assert [line["energy_joules"] for line in folder.read_lines("metrics.jsonl")] == [2.5, 3.5]
