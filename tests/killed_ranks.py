"""Two ranks that train and save, one of which is killed at a point of a checkpoint's writing: for tests/test_write_points.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

from bbopd.errors import BbopdError
from bbopd.trainer.ranks import Ranks
from bbopd.trainer.write_points import watched
from tests.tiny_models import tiny_tokenizer
from tests.trainer_ranks import RESUMED, World, ranked, run_worlds


def save_until_killed(ranks: Ranks, folder: Path, name: str, rank: int, at: str) -> Any:
    """Three steps, a checkpoint after each; the third one's is where the kill comes."""
    trainer = ranked(RESUMED, ranks)
    saves = 0

    def end_at(point: str) -> None:
        nonlocal saves
        saves += point == "shards copied"
        if ranks.rank == rank and point == at and saves == (2 if at in BEFORE_COPYING else 3):
            os.kill(os.getpid(), signal.SIGKILL)

    try:
        with watched(end_at):
            if ranks.rank:
                trainer.follow()
                return None
            for step in range(3):
                trainer.train_step(RESUMED.micro_batches(step))
                trainer.save(folder / name, step + 1, tiny_tokenizer(), {"step": step + 1}, keep=2)
                trainer.end()
        ranks.dismiss(None)
    except BbopdError as error:
        return str(error)
    return None


BEFORE_COPYING = ("begun", "config")
"""Points of a checkpoint that come before the one by which they are counted."""


if __name__ == "__main__":
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", message=".*fork.*")
    place = Path(sys.argv[1])
    asked = json.loads((place / "worlds.json").read_text())
    run_worlds(place, {name: World(2, save_until_killed, (name, *kill)) for name, kill in asked.items()})
