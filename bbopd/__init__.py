"""Black-box, on-policy distillation of language models.

The whole kernel surface is two functions: `linear_distill` trains, `linear_logprobs` scores. Names are resolved on first
use, so that ``import bbopd`` alone costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bbopd.ops import linear_distill, linear_logprobs
    from bbopd.types import CandidateTeacher, DistillLoss, FullTeacher, SampledTeacher, TokenLogprobs, TopKTeacher

__version__ = "0.1.0"

__all__ = [
    "CandidateTeacher",
    "DistillLoss",
    "FullTeacher",
    "SampledTeacher",
    "TokenLogprobs",
    "TopKTeacher",
    "__version__",
    "linear_distill",
    "linear_logprobs",
]

_HOME = {"linear_distill": "bbopd.ops", "linear_logprobs": "bbopd.ops"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'bbopd' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "bbopd.types")), name)


def __dir__() -> list[str]:
    return __all__
