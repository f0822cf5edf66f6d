"""``bbopd distill run.yaml --ray``: a run whose processes a Ray cluster holds; ``bbopd cluster scale``: more or fewer of its engines."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbopd.config import RunConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="the run's folder")
    parser.add_argument("--engines", type=int, required=True, metavar="N", help="how many, up to the second number of cluster.engines")


def run(args: argparse.Namespace) -> int:
    """Returns the exit status. Raises `ConfigError`."""
    from bbopd.cluster.engines import want_engines

    want_engines(args.run, args.engines)
    print(f"{args.run} will have {args.engines} engines")
    return 0


def execute_on_cluster(config: RunConfig, address: str, *, as_json: bool = False) -> int:
    """The driver's part of the run; returns its exit status. ``as_json`` is that of `execute`. Raises `BbopdError`."""
    from bbopd.cluster.driver import run_on_cluster

    stream = sys.stderr if as_json else sys.stdout

    def show(text: str) -> None:
        stream.write(text)
        stream.flush()

    status = run_on_cluster(config, address, show)
    if as_json and status == 0:
        print((Path(config.output) / "summary.json").read_text(encoding="utf-8").replace("\n", ""))
    return status
