"""``bbopd serve`` with the options that a cluster gives it: its model is a table, and each answer is written down before it is given.

The log, ``paid.log`` in the folder that is named as the model, has a line an answer: the question as caches of answers know it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bbopd.cli.main import build_parser
from bbopd.config import ServeConfig
from bbopd.config_file import parse_config, read_yaml
from bbopd.rpc.run_server import serve, set_up_logs
from bbopd.teachers.fake import FakeBackend
from bbopd.teachers.questions import ScoringQuestions
from bbopd.types import Rollout, SignalSpec, TeacherSignal

VOCAB = 262


class PaidBackend(FakeBackend):
    """A `FakeBackend` that writes to ``log`` what it has answered."""

    def __init__(self, log: Path) -> None:
        super().__init__(VOCAB, delay=0.01)
        self._log = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def score(self, rollouts: Sequence[Rollout], want: SignalSpec) -> list[TeacherSignal]:
        signals = super().score(rollouts, want)
        questions = ScoringQuestions(self.info, want)
        os.write(self._log, "".join(f"{questions.key(rollout).hex()}\n" for rollout in rollouts).encode())
        return signals


def main() -> None:
    args = build_parser().parse_args(sys.argv[1:])
    given = read_yaml(args.config) | {"host": args.host, "port": args.port}
    config = parse_config(given, args.overrides, ServeConfig, "the test")
    set_up_logs(config.log)
    serve(PaidBackend(Path(config.model) / "paid.log"), config, ready_file=args.ready_file)


if __name__ == "__main__":
    main()
