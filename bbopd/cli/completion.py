"""``bbopd completion``: what a shell needs to complete commands, options and files; written by shtab from the parser itself."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

_FILES = ("config", "path", "paths", "model", "models", "runs", "text", "output", "tasks")
_FILE_METAVARS = ("FILE", "FOLDER", ".json", ".yaml", ".jsonl", "MODEL", "SOURCE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh", "fish"), help="the shell to write for; docs/cli.md says where it looks")


def run(args: argparse.Namespace) -> int:
    import shtab

    from bbopd.cli.main import build_parser

    parser = build_parser()
    for action in _actions(parser):
        if action.choices is None and action.nargs != 0 and _names_a_file(action):
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell))
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Of all commands; `eval human`, two words, is no command to a shell, and left out."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name in [name for name in action.choices if " " in name]:
                del action._name_parser_map[name]
                action._choices_actions = [choice for choice in action._choices_actions if choice.dest != name]
            for child in action.choices.values():
                yield from _actions(child)
        else:
            yield action


def _names_a_file(action: argparse.Action) -> bool:
    shown = action.metavar if isinstance(action.metavar, str) else ""
    return action.dest in _FILES or any(part in shown for part in _FILE_METAVARS)
