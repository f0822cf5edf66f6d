"""What an objective is, and how one refuses a teacher that cannot serve it.

Shape suffixes: ``N`` rows of a batch that predict a response token, ``D`` hidden, ``V`` vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, get_args, runtime_checkable

import torch
from torch import Tensor

from bbopd.config import TeacherConfig
from bbopd.errors import TeacherError, TrainingError
from bbopd.output_head import OutputHead
from bbopd.types import DistillBatch, DistillLoss, Level, SignalSpec, TeacherInfo

SIGNALS: tuple[str, ...] = get_args(TeacherConfig.model_fields["signal"].annotation)
"""What a configuration can ask a teacher for: the levels that a message may propose."""


OF_LEVEL: dict[Level, str] = {"sampled": "policy_gradient", "text": "seqkd"}
"""Levels that no divergence can use, and the objective that does."""


class Objective(Protocol):
    """What is minimised: which teacher signal it needs, and its loss on a batch."""

    @property
    def name(self) -> str: ...

    @property
    def needs(self) -> tuple[Level, ...]:
        """Access levels that it can use, the best first; empty where it asks no teacher."""
        ...

    def signal(self, teacher: TeacherConfig) -> SignalSpec | None:
        """What to ask of the teacher for every response token; None where there is nothing to ask.

        Raises
        ------
        ConfigError
            ``teacher.signal`` is a level that this objective cannot use.
        """
        ...

    def check(self, info: TeacherInfo, want: SignalSpec) -> None:
        """Refuse a teacher that does not offer ``want``, before anything is spent on it.

        Raises
        ------
        TeacherError
            Level, temperature or ``top_k`` are not offered; names the objectives that would fit.
        """
        ...

    def loss(
        self,
        hidden_ND: Tensor,
        head: OutputHead,
        batch: DistillBatch,
        *,
        ce_weight: float,
        kd_weight: float,
        normalizer: tuple[float, float] | None,
    ) -> DistillLoss:
        """The loss of ``batch``, from the hidden states of its ``target_rows`` and the head.

        ``normalizer`` holds the (ce_tokens, kd_tokens) of the whole optimizer step, so that micro-batches add up to its mean; None
        takes the batch's own.

        Raises
        ------
        TrainingError
            On a CPU, hidden states or weights that are not finite.
        """
        ...


@runtime_checkable
class Scheduled(Protocol):
    """An objective whose settings change over the run."""

    def at(self, progress: float) -> Objective:
        """What it is when ``progress`` (0 to 1) of the run's steps are done."""
        ...


def check_offer(name: str, info: TeacherInfo, want: SignalSpec, needs_of: Mapping[str, tuple[Level, ...]]) -> None:
    """Refuse ``info`` where it does not offer ``want`` exactly. ``needs_of`` are the levels each objective can use."""
    offer = info.offer(want.level)
    offered = [one.level for one in info.offers]
    if offer is None:
        fitting = [other for other, needs in needs_of.items() if set(needs) & set(offered) & set(SIGNALS)]
        fitting += [f"{other} (with teacher.signal={level})" for level, other in OF_LEVEL.items() if level in offered and other != name]
        fitting = fitting or ["sft"]
        levels = ", ".join(offered) or "nothing"
        raise TeacherError(
            f"{name} asks for the {want.level} signal, but teacher {info.model} offers {levels}: "
            f"choose another teacher.signal, or an objective that fits: {', '.join(fitting)}"
        )
    if not offer.temperature_min <= want.temperature <= offer.temperature_max:
        raise TeacherError(
            f"{name} asks for temperature {want.temperature}, but teacher {info.model} applies {offer.temperature_min} to "
            f"{offer.temperature_max} at the {want.level} level: set objective.temperature within that"
        )
    if want.top_k > offer.max_top_k:
        raise TeacherError(
            f"{name} asks for the top {want.top_k} ids a token, but teacher {info.model} gives at most {offer.max_top_k}: "
            f"set teacher.topk={offer.max_top_k} or less"
        )


def check_student(hidden_ND: Tensor, head: OutputHead) -> None:
    """`require_finite`, on a CPU only: a GPU would have to be waited for, and its NaN reaches the loss."""
    if hidden_ND.device.type == "cpu":
        require_finite(("hidden states", hidden_ND), ("output weights", head.weight_VD))


def require_finite(*parts: tuple[str, Tensor]) -> None:
    """Raises `TrainingError` for a student that has diverged: one of its named parts holds NaN or infinity."""
    for what, tensor in parts:
        if not bool(torch.isfinite(tensor.detach().sum(dtype=torch.float32))):
            raise TrainingError(f"the student's {what} are not finite: lower train.lr, or resume from an earlier checkpoint")
