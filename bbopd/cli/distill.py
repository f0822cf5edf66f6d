"""``bbopd distill run.yaml``: one run from a file, or on from where it stopped."""

from __future__ import annotations

import argparse
import os


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the run's YAML file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="lay one value over the file; may be repeated")
    parser.add_argument("--plain", action="store_true", help="plain lines instead of the live display")
    parser.add_argument("--json", action="store_true", help="print the run's summary as one JSON object; progress goes to the error stream")
    parser.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="have Ray, at HOST:PORT or auto, or started here, place the run's processes and restart them (the section cluster)",
    )


def run(args: argparse.Namespace) -> int:
    from bbopd.cli.execute import execute
    from bbopd.config_file import load_config

    config = load_config(args.config, args.set)
    if args.ray is not None:
        from bbopd.cli.cluster import execute_on_cluster

        return execute_on_cluster(config, args.ray, as_json=args.json)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # torchrun has started others
        from bbopd.cli.ranked import execute_ranked

        return execute_ranked(config, plain=args.plain, as_json=args.json)
    return execute(config, plain=args.plain, as_json=args.json)
