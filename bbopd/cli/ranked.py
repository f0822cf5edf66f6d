"""``torchrun -m bbopd distill run.yaml``: one run by several processes."""

from __future__ import annotations

from bbopd.cli.execute import execute
from bbopd.config import RunConfig
from bbopd.errors import RankError
from bbopd.pipeline.ranked import check_ranked, follow
from bbopd.trainer.ranks import Ranks


def execute_ranked(config: RunConfig, *, plain: bool = False, as_json: bool = False) -> int:
    """This process's part of the run; returns its exit status. Raises `BbopdError`, on every rank where one has failed."""
    ranks = Ranks.join(config.student.device, config.train.parallel)
    if ranks.rank:
        follow(config, ranks)
        return 0
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
