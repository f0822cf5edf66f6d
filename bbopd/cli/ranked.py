"""``torchrun -m bbopd distill run.yaml``: one run by several processes."""

from __future__ import annotations

import os
import sys

from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.errors import RankError
from bbopd.pipeline.ranked import check_ranked, follow
from bbopd.trainer.ranks import Ranks


def execute_ranked(config: RunConfig, *, plain: bool = False, as_json: bool = False) -> int:
    """This process's part of the run; returns its exit status. Raises `BbopdError`, on every rank where one has failed.

    Where another rank is lost, the process ends here: Python would wait at its end for collectives that the lost one holds up.
    """
    ranks = Ranks.join(config.student.device, config.train.parallel)
    try:
        return _follow(config, ranks) if ranks.rank else _drive(config, ranks, plain, as_json)
    except RankError as error:
        print(f"bbopd distill: {error}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(error.exit_code)


def _follow(config: RunConfig, ranks: Ranks) -> int:
    follow(config, ranks)
    return 0


def _drive(config: RunConfig, ranks: Ranks, plain: bool, as_json: bool) -> int:
    try:
        check_ranked(config)
        status = execute(config, plain=plain, as_json=as_json, ranks=ranks)
    except RankError:
        raise  # there is nobody left to tell
    except BaseException as error:
        ranks.dismiss(error)
        raise
    ranks.dismiss(None)
    return status
