"""``python -m benchmarks.gpu``: both ops on a GPU beside their peers; tables in ``benchmarks/results/<card>/``.

The cases run in a process of their own, which says what it is about to try: where it is lost with the device, or hangs, what it tried is
left out for that reason and a new process goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import cases, gpu_worker
from benchmarks.cases import Case
from benchmarks.contest import ROOT
from benchmarks.report import RESULTS

SILENCE = 240.0  # seconds after which what is being tried counts as hanging
INPUTS = "inputs"
COMPILED = ("topk", "full_forward")


@dataclass(slots=True)
class Job:
    """A case to measure; ``left_out`` names contestants that took the device with them, and how."""

    script: str
    case: Case
    compiles: bool
    left_out: dict[str, str] = field(default_factory=dict)


def jobs_of(options: argparse.Namespace) -> list[Job]:
    """Shape by shape. Compiling takes longer than measuring: unless all is asked for, few cases have the peers that do."""
    shapes = options.shapes or (cases.ALL_SHAPES if options.full else cases.SIX_SHAPES)
    jobs = []
    for one in shapes:
        is_first = one == shapes[0]
        for case in cases.gpu_distill_cases(one, options.device, options.dtype, every_divergence=options.full or is_first):
            jobs.append(Job("gpu_distill", case, options.full or (is_first and case.objective in COMPILED)))
        jobs.append(Job("gpu_logprobs", cases.gpu_logprobs_case(one, options.device, options.dtype), options.full or is_first))
    return [job for job in jobs if not options.objectives or job.case.objective in options.objectives]


def run_jobs(jobs: list[Job], options: argparse.Namespace, arguments: list[str]) -> tuple[int, list[str]]:
    """Run them all, or as many as there is time for; how many were run, and what failed that should not have."""
    ends = time.monotonic() + 60 * options.minutes if options.minutes else None
    failures: list[str] = []
    done = 0
    while done < len(jobs) and (ends is None or time.monotonic() < ends):
        request = {
            "jobs": [asdict(job) for job in jobs[done:]],
            "results": str(options.results),
            "rounds": options.rounds,
            "arguments": arguments,
            "seconds": None if ends is None else ends - time.monotonic(),
        }
        finished, trying, how = _run_worker(request, failures)
        done += finished
        if not how:
            break
        job = jobs[done]
        if trying in job.left_out or trying == INPUTS:  # nothing is left to leave out
            failures.append(f"{job.case.name}: {trying}: {how}")
            done += 1
        else:
            job.left_out[trying] = how
            if trying.startswith("bbopd"):
                failures.append(f"{job.case.name}: {trying}: {how}")
    return done, failures


def _run_worker(request: dict[str, Any], failures: list[str]) -> tuple[int, str, str]:
    """Cases finished by one process, what it tried last, and how it ended before its time, or an empty string."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "benchmarks.gpu_worker"]
    finished, trying, hangs = 0, INPUTS, threading.Event()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT) as worker:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(request))
        worker.stdin.close()

        def kill() -> None:
            hangs.set()
            worker.kill()

        while True:
            timer = threading.Timer(SILENCE, kill)
            timer.start()
            line = worker.stdout.readline()
            timer.cancel()
            if not line:
                break
            if not line.startswith(gpu_worker.MARK):
                print(line, end="", flush=True)
                continue
            told = json.loads(line.removeprefix(gpu_worker.MARK))
            trying = told.get("trying", trying)
            failures += told.get("failures", [])
            if "finished" in told:
                finished, trying = finished + 1, INPUTS
                print(told["finished"], flush=True)
    how = f"the process ended with {worker.returncode}" if worker.returncode else ""
    return finished, trying, f"nothing was heard for {SILENCE:.0f} s" if hangs.is_set() else how


def shape(text: str) -> tuple[int, int, int]:
    tokens, vocabulary, width = (int(number) for number in text.lower().split("x"))
    return tokens, vocabulary, width


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--full", action="store_true", help=f"all {len(cases.ALL_SHAPES)} shapes instead of {len(cases.SIX_SHAPES)}")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="NxVxD", help="these shapes instead: tokens x vocabulary x hidden")
    parser.add_argument("--objectives", nargs="+", choices=[*cases.GPU_OBJECTIVES, "logprobs"], help="these alone")
    parser.add_argument("--minutes", type=float, help="begin no case after so many")
    parser.add_argument("--rounds", type=int, default=10, help="at most, of each case (default 10)")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"], help="cpu: a dry run, with TRITON_INTERPRET=1 and tiny shapes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder for <card>/*.csv and *.md")
    options = parser.parse_args(arguments)
    options.results = options.results.resolve()
    return options


def main() -> int:
    arguments = sys.argv[1:]
    options = parse(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} of {sys.executable} sees no GPU: run this with the python of a CUDA build, on a machine with a card"
        )
        return 2
    jobs = jobs_of(options)
    done, failures = run_jobs(jobs, options, arguments)
    if done < len(jobs):
        print(f"{len(jobs) - done} of {len(jobs)} cases were left out: {options.minutes:g} minutes were up")
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
