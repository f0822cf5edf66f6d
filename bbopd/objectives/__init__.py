"""What a run minimises: one short file per family of objectives, and the table of them."""

from __future__ import annotations

from collections.abc import Callable

from bbopd.config import ObjectiveConfig
from bbopd.objectives.aligned import Aligned
from bbopd.objectives.base import Objective
from bbopd.objectives.gad import Gad
from bbopd.objectives.mixed import Mixed
from bbopd.objectives.sampled_kl import SampledKL
from bbopd.objectives.seqkd import SeqKD
from bbopd.objectives.sft import Sft
from bbopd.objectives.token_level import NEEDS, TokenLevel
from bbopd.objectives.verbal import Verbal

__all__ = ["OBJECTIVES", "Objective", "make_objective"]

OBJECTIVES: dict[str, Callable[[ObjectiveConfig], Objective]] = {
    **dict.fromkeys(NEEDS, TokenLevel),
    "mixed": Mixed,
    "aligned": Aligned,
    "policy_gradient": SampledKL,
    "sft": Sft,
    "seqkd": SeqKD,
    "verbal": Verbal,
    "gad": Gad,
}
"""By the name in ``objective.name``."""


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` names, with its settings."""
    return OBJECTIVES[config.name](config)
