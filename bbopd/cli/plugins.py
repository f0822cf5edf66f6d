"""``bbopd plugins``: the teachers, engines, objectives, filters and trackers there are, the library's own and those of other packages."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from bbopd import __version__
from bbopd.errors import ConfigError

if TYPE_CHECKING:
    from bbopd.plugins import Plugin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")


def run(args: argparse.Namespace) -> int:
    """List them; one that does not load is shown with what is wrong."""
    from bbopd.plugins import GROUPS, installed

    rows: list[dict[str, Any]] = []
    for name, group in GROUPS.items():
        rows += [{"group": name, "name": one, "package": "bbopd", "version": __version__, "error": ""} for one in group.built_in]
        there = installed(name)
        for plugin in there:
            error = _error(plugin)
            rows.append({"group": name, "name": plugin.name, "package": plugin.package, "version": plugin.version, "error": error})
    if args.json:
        print(json.dumps({"plugins": rows}))
        return 0
    for name, group in GROUPS.items():
        print(f"{name}  [{group.setting}]")
        print(f"  {', '.join(group.built_in)}  (bbopd {__version__})")
        for row in rows:
            if row["group"] == name and row["package"] != "bbopd":
                print(
                    f"  {row['name']}  ({row['package']} {row['version']})"
                    + (f"\n    does not work: {row['error']}" if row["error"] else "")
                )
    return 0


def _error(plugin: Plugin) -> str:
    """Why a run could not use it, or nothing."""
    from bbopd.plugins import find

    try:
        find(plugin.group, plugin.name)
        plugin.load()
        if plugin.group == "objectives":
            from bbopd.objectives import plugin_facts

            plugin_facts(plugin)
    except ConfigError as error:
        return str(error)
    return ""
