"""What the engine's process is started with: preloads, bound cores, and nobody's own settings overwritten."""

import json
import os
import subprocess
import sys
from pathlib import Path

from bbopd.vllm_setup import engine_environment, physical_cores


def topology(folder: Path, siblings: dict[int, str]) -> Path:
    for processor, listed in siblings.items():
        place = folder / f"cpu{processor}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(listed + "\n")
    return folder


def test_one_thread_a_core_even_where_two_would_fit(tmp_path):
    machine = topology(tmp_path, {0: "0,4", 1: "1,5", 2: "2,6", 3: "3,7", 4: "0,4", 5: "1,5", 6: "2,6", 7: "3,7"})
    assert physical_cores(range(8), machine) == [0, 1, 2, 3]
    assert physical_cores([5, 1, 6], machine) == [1, 6]
    assert physical_cores([9, 3], machine) == [3, 9]  # a processor that the kernel does not describe is its own core


def test_a_processor_that_this_process_may_not_use_is_not_bound():
    assert set(physical_cores()) <= os.sched_getaffinity(0)


def test_on_a_cpu_libraries_are_preloaded_and_missing_ones_named():
    found = engine_environment("cpu", {"PATH": "/bin", "LD_PRELOAD": "/opt/libmine.so", "OMP_NUM_THREADS": "1"})
    preloaded = found.variables["LD_PRELOAD"].split(":")
    assert preloaded[0] == "/opt/libmine.so"
    for library in ("libiomp5", "libtcmalloc_minimal"):
        is_loaded = any(library in path for path in preloaded)
        is_noted = any(library in note and "install" in note for note in found.notes)
        assert is_loaded != is_noted
    cores = physical_cores()
    assert found.variables["PATH"] == "/bin"
    assert found.variables["OMP_NUM_THREADS"] == str(len(cores))  # set for the run, it would leave the engine one core
    if any("libiomp5" in path for path in preloaded):
        assert f"proclist=[{','.join(map(str, cores))}]" in found.variables["KMP_AFFINITY"]


def test_what_someone_has_set_already_is_kept():
    base = {"KMP_AFFINITY": "none", "VLLM_LOGGING_LEVEL": "DEBUG", "LD_PRELOAD": "/a/libiomp5.so /b/libtcmalloc_minimal.so.4"}
    found = engine_environment("cpu", base).variables
    assert found["KMP_AFFINITY"] == "none"
    assert found["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert found["LD_PRELOAD"] == "/a/libiomp5.so:/b/libtcmalloc_minimal.so.4"


def test_on_a_gpu_nothing_is_preloaded():
    found = engine_environment("cuda", {"OMP_NUM_THREADS": "3"})
    assert "LD_PRELOAD" not in found.variables
    assert found.variables["OMP_NUM_THREADS"] == "3"
    assert found.notes == ()


_COMMAND = """
import json, os, sys
from bbopd.vllm_setup import enter_engine_environment
notes = enter_engine_environment("cpu")
kept = {name: os.environ.get(name) for name in ("MINE", "OMP_NUM_THREADS", "LD_PRELOAD", "BBOPD_ENGINE_PROCESSORS")}
print(json.dumps([os.getpid(), sys.argv, sys.flags.dev_mode, kept, sorted(os.sched_getaffinity(0))]))
"""


def test_a_command_goes_on_in_the_same_process_with_the_engines_environment(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(_COMMAND)
    arguments = [sys.executable, "-X", "dev", str(script), "--a", "b c", ""]
    environment = {**os.environ, "MINE": "x", "OMP_NUM_THREADS": "77"}
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    out, _ = process.communicate(timeout=60)
    pid, argv, is_dev, kept, processors = json.loads(out)
    assert (pid, argv, is_dev) == (process.pid, [str(script), "--a", "b c", ""], True)
    assert kept["MINE"] == "x"
    assert kept["OMP_NUM_THREADS"] == str(len(physical_cores()))
    assert kept["LD_PRELOAD"] == engine_environment("cpu").variables["LD_PRELOAD"]
    assert kept["BBOPD_ENGINE_PROCESSORS"] is None, "what it starts itself begins afresh"
    assert processors == sorted(os.sched_getaffinity(0))
