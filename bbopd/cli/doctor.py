"""``bbopd doctor run.yaml``: before anything is spent, whether the run can work, and what it will take."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections import Counter
from contextlib import aclosing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bbopd.doctor.findings import Finding

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay one value over the file; may be repeated")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds any single check may take (default: 120)")
    parser.add_argument(
        "--teacher-tokenizer", metavar="MODEL", help="hub id or folder of the teacher's tokenizer, to name tokens that differ"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="see also whether Ray, at HOST:PORT or auto, or started here, has room for what the section cluster asks for",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print a line for each check; 0 where none failed, else 1."""
    return asyncio.run(_examine(args))


async def _examine(args: argparse.Namespace) -> int:
    from bbopd.config_file import load_config
    from bbopd.doctor.examine import examine_run
    from bbopd.doctor.findings import Check, Finding, SetUp, Verdict, passed, warned
    from bbopd.errors import ConfigError

    findings: list[Finding] = []

    def show(finding: Finding) -> None:
        findings.append(finding)
        if not args.json:
            print(line_of(finding), flush=True)

    async def check_cluster(setup: SetUp) -> Verdict:
        from bbopd.cluster.hosts import look

        placed, missing = await asyncio.to_thread(look, setup.config, args.ray)
        said = "; ".join(map(str, placed))
        if missing:
            return warned(f"{said}; but it needs {missing}: the run waits for what others hold, or end that (`ray status` shows it)")
        return passed(said)

    try:
        config = load_config(args.config, args.set)
    except ConfigError as error:
        show(Finding("configuration", "fail", " ".join(str(error).split()), 0.0))
    else:
        show(Finding("configuration", "pass", args.config, 0.0))
        more = [] if args.ray is None else [Check("cluster", check_cluster)]
        examination = examine_run(config, time_limit=args.timeout, teacher_tokenizer=args.teacher_tokenizer, more=more)
        async with aclosing(examination) as found:
            async for finding in found:
                show(finding)
    counts = Counter(finding.status for finding in findings)
    failed = counts["fail"] > 0
    if args.json:
        lines = [{"name": one.name, "status": one.status, "detail": one.detail, "seconds": round(one.seconds, 3)} for one in findings]
        print(json.dumps({"config": args.config, "can_run": not failed, "checks": lines}))
    else:
        print(f"{counts['pass']} passed, {counts['warn']} warned, {counts['fail']} failed, {counts['skip']} skipped: {args.config}")
    return 1 if failed else 0


def line_of(finding: Finding) -> str:
    return f"{finding.status.upper()}  {finding.name}: {finding.detail} ({finding.seconds:.1f} s)"
