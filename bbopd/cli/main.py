"""The command line, ``bbopd demo | distill | serve | …`` (all of them in ``_COMMANDS``): nothing heavy is imported before its time."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence

from bbopd import __version__
from bbopd.cli import (
    cache,
    check_teacher,
    cluster,
    compare,
    completion,
    demo,
    distill,
    doctor,
    eval,
    eval_human,
    init,
    objectives,
    plan,
    plugins,
    report,
    sample_server,
    serve,
)
from bbopd.errors import BbopdError, CheckpointError

_COMMANDS = {
    "demo": (demo, "distil a small model end to end on this machine, with its teacher behind gRPC"),
    "distill": (distill, "run a distillation from a YAML file"),
    "init": (init, "ask five questions, and write the file of a run"),
    "compare": (compare, "train and measure the arms of a comparison alike, and say what differs"),
    "plan": (plan, "say what a run holds, takes and costs, before any of it is loaded, and how it would scale"),
    "doctor": (doctor, "check a run before it spends anything, and say what it will take"),
    "objectives": (objectives, "say what each objective needs, computes and costs, and which ones a teacher can serve"),
    "plugins": (plugins, "list the teachers, engines, objectives, filters and trackers there are, those of other packages too"),
    "serve": (serve, "host a teacher over gRPC"),
    "sample-server": (sample_server, "host vLLM for runs on other machines, which push their weights into it"),
    "check-teacher": (check_teacher, "hold a teacher, in any language, to the protocol"),
    "eval": (eval, "measure models: bits per byte, agreement with a teacher, and tasks"),
    "eval human": (eval_human, "have people rate answers, on a page that does not tell whose they are"),
    "cluster scale": (cluster, "change how many engines write for a run on a cluster, while it goes on"),
    "report": (report, "write one page about a run, or several beside each other"),
    "cache": (cache, "look after the answers of teachers that were kept"),
    "completion": (completion, "write what bash, zsh or fish needs to complete commands and options"),
}

# What a message says to type: a setting (rollouts.engine=hf, teacher.topk), a flag, a command in backticks, an installation.
_TO_TYPE = re.compile(
    r"\b(?:student|teachers?|rollouts|objective|train|data|eval|cluster|measures)(?:\.[a-z_]+)+(?:=[^\s,;:]+)?"
    r"|(?<![\w-])--[a-z][a-z-]*|`[^`]+`|pip install '[^']+'"
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bbopd", description="Black-box, on-policy distillation of language models.")
    parser.add_argument("--version", action="version", version=f"bbopd {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + "."))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0 done, 1-9 an error (`bbopd.errors`), 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if " ".join(words[:2]) in _COMMANDS:  # such as eval human, a command of its own beside models to measure
        words[:2] = [" ".join(words[:2])]
    args = build_parser().parse_args(words)
    try:
        return int(_COMMANDS[args.command][0].run(args))
    except BbopdError as error:
        _complain(args.command, str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain(args.command, "interrupted")
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        _complain(args.command, str(error))
        return CheckpointError.exit_code


def _complain(command: str, message: str) -> None:
    """On the error stream. On a terminal the command is red, and what can be typed to mend it cyan, unless NO_COLOR says otherwise."""
    stream = sys.stderr
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        print(f"bbopd {command}: {message}", file=stream)
        return
    print(f"\033[1;31mbbopd {command}:\033[0m " + _TO_TYPE.sub("\033[36m\\g<0>\033[0m", message), file=stream)
