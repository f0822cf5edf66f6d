"""``bbopd check-teacher``: hold any implementation of the protocol to what it says."""

from __future__ import annotations

import argparse
import dataclasses
import json

from bbopd.cli.access import add_access_arguments, read_access
from bbopd.errors import TeacherError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", metavar="TARGET", help="grpc://host:port")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds any single answer may take (default: 30)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    add_access_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Print a line for each check; 0 where none failed, else 3. Raises `BbopdError` where nobody answers at all."""
    import asyncio

    return asyncio.run(_check(args))


async def _check(args: argparse.Namespace) -> int:
    from bbopd.rpc.conformance import check_teacher

    target = args.target if "://" in args.target else f"grpc://{args.target}"
    counts = {"pass": 0, "fail": 0, "skip": 0}
    results = []
    async for result in check_teacher(target, read_access(args), timeout=args.timeout):
        counts[result.status] += 1
        results.append(result)
        if not args.json:
            print(f"{result.status.upper()}  {result.name}: {result.detail} ({result.seconds:.2f} s)", flush=True)
    if args.json:
        print(json.dumps({"target": target, **counts, "checks": [dataclasses.asdict(result) for result in results]}))
    else:
        print(f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped: {target}")
    return TeacherError.exit_code if counts["fail"] else 0
