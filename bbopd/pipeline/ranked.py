"""A run whose student is trained by several processes: rank 0 is the run, the others only train.

Rank 0 draws, samples, asks the teacher, filters, batches, evaluates and writes every file but the shards of checkpoints. What it does with
a whole student it does with a copy of its own, which takes the weights each time they are pushed.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from bbopd.config import RunConfig
from bbopd.errors import CheckpointError, ConfigError, RankError
from bbopd.modeling import compute_dtype, output_head
from bbopd.objectives import Objective, make_objective
from bbopd.pipeline.student import empty_student, seed_generators
from bbopd.trainer.checkpoint_files import verify_checkpoint
from bbopd.trainer.ranked import RankedTrainer
from bbopd.trainer.ranks import Ranks
from bbopd.types import DIVERGENCES

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_ranked(config: RunConfig) -> None:
    """Refuse what several ranks cannot train together. Raises `ConfigError`."""
    student, train, rollouts = config.student, config.train, config.rollouts
    for key, is_set, why in (
        ("student.quantize", student.quantize is not None, "codes of four or eight bits cannot be cut into slices"),
        ("train.optimizer=adamw_8bit", train.optimizer == "adamw_8bit", "bitsandbytes takes no slices of weights; set adamw"),
        ("objective.name=gad", config.objective.name == "gad", "its discriminator is trained by one process"),
        ("teacher.self", config.teacher.self is not None, "the student's teacher would be out of date"),
        (
            "teacher.signal=candidates with rollouts.max_staleness=1",
            bool(config.candidates) and rollouts.engine != "hf" and rollouts.max_staleness > 0,
            "the copy of the student that chooses ids changes while it does; set rollouts.max_staleness=0",
        ),
        (
            "train.parallel.head=split",
            train.parallel.head == "split" and config.objective.name not in (*DIVERGENCES, "sft"),
            f"objective {config.objective.name} asks the student for more than the fused loss does; set it to gathered",
        ),
    ):
        if is_set:
            raise ConfigError(f"{key} cannot be trained by several ranks: {why}; leave torchrun out, or the setting")


def drive(
    config: RunConfig,
    ranks: Ranks,
    whole: PreTrainedModel,
    objective: Objective,
    vocab_size: int,
    checkpoint: Path | None,
) -> RankedTrainer:
    """Rank 0's trainer, of its ``whole`` student; the others make theirs at the same time. Raises `CheckpointError`, and `ModelError`."""
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
    output_head(whole)  # proved where there are values
    shape = {"vocab_size": vocab_size, "attention": whole.config._attn_implementation}
    ranks.tell(do="begin", checkpoint=None if checkpoint is None else str(checkpoint.absolute()), **shape)
    return _trainer(config, ranks, objective, checkpoint, whole, **shape)


@contextmanager
def checkpoints_ended(trainer: RankedTrainer) -> Iterator[None]:
    """Wait at the end for the checkpoint being written. Raises `CheckpointError` where it cannot be, and nothing else has gone wrong."""
    try:
        yield
    except RankError:
        raise  # it will not be ended
    except BaseException:
        with suppress(CheckpointError):
            trainer.end()
        raise
    trainer.end()


def follow(config: RunConfig, ranks: Ranks) -> None:
    """The part of every rank but the first, until rank 0 ends the run.

    Raises `RankError` where rank 0 or another rank fails. A request to stop is for rank 0 to hear, and to pass on as the end.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with ranks.together():
        seed_generators(config.train.seed, config.train.deterministic)
        torch.manual_seed(config.train.seed + ranks.rank)
        order = ranks.hear()
        if order["do"] == "end":
            ranks.heed_end(order)
            return
        checkpoint = None if order["checkpoint"] is None else Path(order["checkpoint"])
        shape = {name: order[name] for name in ("vocab_size", "attention")}
        trainer = _trainer(config, ranks, make_objective(config.objective), checkpoint, None, **shape)
    trainer.follow()


def _trainer(
    config: RunConfig,
    ranks: Ranks,
    objective: Objective,
    checkpoint: Path | None,
    whole: PreTrainedModel | None,
    *,
    vocab_size: int,
    attention: str,
) -> RankedTrainer:
    with ranks.together():
        with torch.device("meta"):
            model = empty_student(config.student)
        model.set_attn_implementation(attention)
        return RankedTrainer(
            model,
            objective,
            ranks=ranks,
            whole=whole,
            merges=config.rollouts.engine != "hf",  # which writes with the whole student itself
            checkpoint=checkpoint,
            train=config.train,
            objective_config=config.objective,
            planned_steps=config.planned_steps,
            compute_dtype=compute_dtype(config.student.dtype, ranks.device),
            vocab_size=vocab_size,
            activation_checkpointing=config.student.activation_checkpointing,
        )
