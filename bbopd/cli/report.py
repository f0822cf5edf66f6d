"""``bbopd report RUN...``: one self-contained page about one run or several."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, finished or not, or a folder of such folders")
    parser.add_argument(
        "--output", metavar="PAGE.html", help="the page (default: report.html in the run's folder; of several runs, runs.html here)"
    )


def run(args: argparse.Namespace) -> int:
    """Print where the page is. Raises `DataError` where a folder holds no run, `BbopdError` where the page cannot be written."""
    from bbopd.report.comparison import render_comparison
    from bbopd.report.html import render
    from bbopd.report.load import find_runs, load_runs
    from bbopd.report.page import write_page

    folders = find_runs(args.runs)
    runs = load_runs(folders)
    if len(runs) == 1:
        path, page = Path(args.output or folders[0] / "report.html"), render(runs[0])
    else:
        path, page = Path(args.output or "runs.html"), render_comparison(runs)
    print(write_page(path, page))
    return 0
