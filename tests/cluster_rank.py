"""A rank that trains nothing, for tests of a cluster: it says who it is, and in its first attempts ends as it is told.

``endings`` in the run's folder has a line an attempt: what each rank does once all have begun, ``kill``, ``wait``, or an exit status,
by commas.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> int:
    folder = Path(json.loads(Path(sys.argv[2]).read_text())["output"])
    rank = int(os.environ["RANK"])
    attempts = folder / f"attempts-{rank}"
    with attempts.open("a") as file:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        file.write(json.dumps({name: os.environ[name] for name in names} | {"pid": os.getpid()}) + "\n")
    number = len(attempts.read_text().splitlines())
    print(f"rank {rank} in attempt {number}", flush=True)
    others = [folder / f"attempts-{other}" for other in range(int(os.environ["WORLD_SIZE"]))]
    deadline = time.monotonic() + 60
    while not all(other.exists() and len(other.read_text().splitlines()) >= number for other in others):
        assert time.monotonic() < deadline, "another rank of this attempt has not begun"
        time.sleep(0.02)
    ending = (folder / "endings").read_text().splitlines()[number - 1].split(",")[rank]
    if ending == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "wait":
        time.sleep(600)
    return int(ending)


if __name__ == "__main__":
    sys.exit(main())
