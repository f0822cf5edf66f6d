"""``bbopd report RUN...``: one self-contained page about one run or several, or about models on tasks."""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run, finished or not, or a folder of such folders; or else results: files of `bbopd eval --output`, folders of "
        "comparisons",
    )
    parser.add_argument(
        "--output",
        metavar="PAGE.html",
        help="the page (default: report.html in the folder, or beside the file; of several, runs.html or models.html here)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def run(args: argparse.Namespace) -> int:
    """Print where the page is. Raises `DataError` where a folder holds no run, `BbopdError` where the page cannot be written."""
    from bbopd.errors import DataError
    from bbopd.report.comparison import render_comparison
    from bbopd.report.html import render
    from bbopd.report.load import find_runs, load_runs
    from bbopd.report.models import render_models
    from bbopd.report.page import write_page
    from bbopd.report.standings import is_standings, read_standings

    paths = [Path(name) for name in args.runs]
    of_models = [path for path in paths if is_standings(path)]
    if of_models:
        if len(of_models) < len(paths):
            other = next(path for path in paths if path not in of_models)
            raise DataError(f"{of_models[0]} holds results of models, {other} is no such: give runs, or results, each a page of its own")
        first = paths[0] / "report.html" if paths[0].is_dir() else paths[0].with_suffix(".html")
        default, page = first if len(paths) == 1 else Path("models.html"), render_models([read_standings(path) for path in paths])
    else:
        folders = find_runs(paths)
        runs = load_runs(folders)
        if len(runs) == 1:
            default, page = folders[0] / "report.html", render(runs[0])
        else:
            default, page = Path("runs.html"), render_comparison(runs)
    written = write_page(Path(args.output) if args.output else default, page)
    print(json.dumps({"page": str(written)}) if args.json else written)
    return 0
