"""The trainer: packed batches in, weight updates and metrics out. It knows no teacher, no engine and no prompt."""

from bbopd.trainer.checkpoint import latest_checkpoint, load_beside, load_checkpoint, require_space, save_checkpoint
from bbopd.trainer.optimizer import build_optimizer, parameter_groups
from bbopd.trainer.schedules import learning_rate_at, loss_weights_at
from bbopd.trainer.step import StepMetrics, Trainer

__all__ = [
    "StepMetrics",
    "Trainer",
    "build_optimizer",
    "latest_checkpoint",
    "learning_rate_at",
    "load_beside",
    "load_checkpoint",
    "loss_weights_at",
    "parameter_groups",
    "require_space",
    "save_checkpoint",
]
