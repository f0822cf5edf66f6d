"""``make gpu``: tests, then times, on this machine's GPU, with the packages that its Python has: nothing is installed, nothing is fetched.

A tree laid out as the package is installed, ``build/gpu``, is what runs; so the machine needs neither an index nor the build's own tools.
The CUDA kernels are compiled into it where CMake, pybind11 and nvcc are there. Only the standard library is imported here.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import util
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "gpu"
TESTS = ("tests/test_gpu*.py", "tests/test_kernels*.py", "tests/test_cuda*.py")
MINUTES = 7.5  # of which the benchmark has what is left, and two at least
LIMIT = 300.0  # seconds for each of the others
DRY = ["--device=cpu", "--dtype=float32", "--shapes", "4x40x8", "--objectives", "hidden_forward", "--rounds=1"]


@dataclass(slots=True)
class Running:
    """A process that writes into a log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path
    may_be_late: bool = False


def lay_out(tree: Path) -> None:
    """The package as it is installed, ``kernels`` inside it, with tests and benchmarks beside it."""
    shutil.rmtree(tree, ignore_errors=True)
    ignored = shutil.ignore_patterns("__pycache__", "_C*", "_cuda*", "results")
    for source, target in (
        ("bbopd", "bbopd"),
        ("kernels", "bbopd/kernels"),
        ("tests", "tests"),
        ("benchmarks", "benchmarks"),
        ("csrc", "csrc"),
    ):
        shutil.copytree(ROOT / source, tree / target, ignore=ignored)
    (tree / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "kernel_resources.csv", tree / "docs")
    # not pyproject.toml: it asks for plugins that this machine may not have
    (tree / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    vllm\n    slow\naddopts = -ra -p no:cacheprovider\n")


def build_cuda(tree: Path) -> str:
    """Compile the CUDA kernels into the tree; why that could not be done, or an empty string."""
    if not (ROOT / "csrc" / "cuda").is_dir():
        return "this source has none"
    for tool in ("cmake", "nvcc"):
        if shutil.which(tool) is None:
            return f"{tool} is not on the PATH"
    if util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    folder = tree.parent / "gpu-cmake"
    pybind11 = subprocess.run([sys.executable, "-m", "pybind11", "--cmakedir"], capture_output=True, text=True, check=True).stdout.strip()
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11}"]
    build = ["cmake", "--build", str(folder), "--target", "_cuda", "--parallel"]
    for command in (configure, build):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)} took more than {LIMIT:.0f} s"
        if done.returncode:
            return f"{' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}"
    for extension in folder.glob("_cuda*.so"):
        shutil.copy(extension, tree / "bbopd")
    return ""


def start(name: str, command: list[str], tree: Path, *, may_be_late: bool = False, **variables: str) -> Running:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tree), *filter(None, [os.environ.get("PYTHONPATH")])])} | variables
    log = tree / f"{name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=tree, env=environment, stdout=file, stderr=subprocess.STDOUT)
    return Running(name, process, log, may_be_late)


def start_tests(tree: Path) -> list[Running]:
    """Every file of tests in a process of its own, all at once, as most of the time goes into compiling; and the memory checker."""
    files = sorted(path.relative_to(tree) for pattern in TESTS for path in tree.glob(pattern))
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    running = [start(file.stem, [*pytest, str(file)], tree) for file in files] if util.find_spec("pytest") else []
    if not running:
        print("  no tests: pytest is not installed", flush=True)
    if shutil.which("compute-sanitizer"):
        command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-m", "tests.small_on_gpu"]
        running.append(start("compute-sanitizer", command, tree, may_be_late=True, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    return running


def finish(one: Running, ends: float) -> bool:
    """Wait for a process; whether it did what it should."""
    try:
        code = one.process.wait(max(ends - time.monotonic(), 1.0))
    except subprocess.TimeoutExpired:
        one.process.kill()
        one.process.wait()
        code = None
    text = one.log.read_text(errors="replace")
    last = text.strip().splitlines()[-1] if text.strip() else ""
    succeeded = code in (0, 5) or (code is None and one.may_be_late)  # pytest's 5: the file has no such test
    how = f"not done after {LIMIT:.0f} s" if code is None else last
    print(f"  {one.name}: {how}" if succeeded else f"  {one.name} FAILED ({how})\n{text[-6000:]}", flush=True)
    return succeeded


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help="every shape, without a limit of time")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run where bbopd is installed, TRITON_INTERPRET=1"
    )
    options, further = parser.parse_known_args()
    begun = time.monotonic()
    print(f"laying out {TREE}", flush=True)
    lay_out(TREE)
    reason = build_cuda(TREE)
    print(f"the CUDA kernels are left out: {reason}" if reason else "the CUDA kernels are built", flush=True)
    print(f"tests ({time.monotonic() - begun:.0f} s)", flush=True)
    ends = time.monotonic() + LIMIT
    results = [finish(one, ends) for one in start_tests(TREE)]
    elapsed = (time.monotonic() - begun) / 60
    print(f"times ({60 * elapsed:.0f} s)", flush=True)
    command = [sys.executable, "-m", "benchmarks.gpu"]
    command += ["--full"] if options.full else [f"--minutes={max(2.0, MINUTES - elapsed):.1f}"]
    command += [*DRY, f"--results={TREE / 'results'}"] if options.device == "cpu" else [f"--results={ROOT / 'benchmarks' / 'results'}"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TREE), *filter(None, [os.environ.get("PYTHONPATH")])])}
    results.append(subprocess.run([*command, *further], cwd=TREE, env=environment).returncode == 0)
    print(f"{'all went well' if all(results) else 'SOMETHING FAILED, see above'} ({time.monotonic() - begun:.0f} s); logs in {TREE}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
