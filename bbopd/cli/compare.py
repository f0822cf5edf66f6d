"""``bbopd compare compare.yaml``: the arms of the literature, trained and measured alike, and a table that says what differs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from bbopd.compare.run import Comparison, Outcome


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the comparison's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay one value over the file; may be repeated")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="only say what will run, and how long it takes by the runs that are done")
    what.add_argument("--table", action="store_true", help="only show what has been measured so far")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables; progress goes to the error stream")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from bbopd.compare.estimate import work_left
    from bbopd.compare.processes import FailedError
    from bbopd.compare.run import Comparison
    from bbopd.config_compare import CompareConfig
    from bbopd.config_file import parse_config, read_yaml

    console = Console(stderr=args.json)
    comparison = Comparison(parse_config(read_yaml(args.config), args.set, CompareConfig, args.config))
    if args.plan:
        if args.json:
            print(json.dumps({"arms": [asdict(item) for item in work_left(comparison)]}))
        else:
            _print_plan(console, comparison)
        return 0
    if args.table:
        outcome = comparison.outcome()
    else:
        outcome = comparison.run(lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True))
    if args.json:
        print(json.dumps(comparison.to_json(outcome)))
    else:
        _print_outcome(console, comparison, outcome)
    return FailedError.exit_code if outcome.failures else 0


def _print_plan(console: Console, comparison: Comparison) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from bbopd.cli.display import clock
    from bbopd.compare.estimate import work_left

    work = work_left(comparison)
    table = Table(box=SIMPLE_HEAD)
    for number, title in enumerate(("arm", "learning rates", "seeds", "runs", "to train", "to measure", "time")):
        table.add_column(title, justify="right" if number > 2 else "left", overflow="fold")
    for item in work:
        table.add_row(
            item.entrant,
            ", ".join(f"{rate:g}" for rate in item.learning_rates),
            ", ".join(map(str, item.seeds)),
            str(item.planned),
            str(item.runs),
            str(item.measurements),
            "not known" if item.seconds is None else clock(item.seconds),
        )
    console.print(table)
    known = [item.seconds for item in work if item.seconds is not None]
    line = f"{sum(item.runs for item in work)} runs to train, {sum(item.measurements for item in work)} models to measure"
    if len(known) == len(work):
        line += f": about {clock(sum(known))}, by the median of the runs that are done"
    else:
        line += "; how long that takes is known after the first run"
    console.print(line, highlight=False, soft_wrap=True)


def _print_outcome(console: Console, comparison: Comparison, outcome: Outcome) -> None:
    from bbopd.compare.table import rich_table, sentences

    measures = comparison.config.measures
    console.print(rich_table(outcome.rows, measures.decide_by, measures.confidence))
    for sentence in sentences(outcome.pairs, measures.decide_by, measures.confidence):
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    for failure in outcome.failures:
        console.print(f"\nmissing: {failure}", highlight=False, markup=False, soft_wrap=True)
    if outcome.failures:
        console.print("the same command tries again what is missing", highlight=False, soft_wrap=True)
    console.print(f"\ntable   {comparison.config.output}/compare.md and compare.json", highlight=False, soft_wrap=True)
