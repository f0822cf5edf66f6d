"""The page of every command, written of the parsers themselves."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from bbopd.cli.main import build_parser

_WIDTH = 76  # of a line of usage


def commands_page() -> str:
    """The page of all commands, in Markdown."""
    lines = ["# Commands", ""]
    for name, parser in parsers():
        lines += [f"{'##' if name.count(' ') == 1 else '###'} `{name}`", "", _plain(parser.description or ""), ""]
        parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, width=_WIDTH)
        lines += ["```text", parser.format_usage().removeprefix("usage: ").rstrip(), "```", ""]
        lines += [line for action in arguments_of(parser) for line in (f"{_title(action)}", f":   {_plain(meaning_of(action))}", "")]
    return "\n".join([*lines, "What a command returns, and how it tells errors: [the command line](../cli.md#errors).", ""])


def parsers() -> list[tuple[str, argparse.ArgumentParser]]:
    """(words, parser) of every command, those below another after it."""
    return list(_below(build_parser(), ""))


def arguments_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """What a command takes, ``--help`` and further commands left out."""
    hidden = (argparse._HelpAction, argparse._SubParsersAction)
    return [action for action in parser._actions if not isinstance(action, hidden)]


def meaning_of(action: argparse.Action) -> str:
    """The help of an argument, with its values and default filled in."""
    parts = [(action.help or "") % {"default": action.default, "prog": "bbopd"}]
    if action.choices is not None:
        parts.append(f"One of {', '.join(map(str, action.choices))}.")
    return " ".join(part if part.endswith((".", ")")) else f"{part}." for part in parts if part)


def _below(parser: argparse.ArgumentParser, name: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for word, child in action.choices.items():
                words = f"{name or 'bbopd'} {word}"
                yield words, child
                yield from _below(child, words)


def _title(action: argparse.Action) -> str:
    value = action.metavar or (action.dest.upper() if action.nargs != 0 else "")
    value = " ".join(value) if isinstance(value, tuple) else value
    if not action.option_strings:
        return f"`{action.metavar or action.dest}`"
    return ", ".join(f"`{option}{f' {value}' if action.nargs != 0 else ''}`" for option in action.option_strings)


def _plain(text: str) -> str:
    """Text of the terminal in Markdown, where angle brackets and stars mean something else."""
    return text.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_")
