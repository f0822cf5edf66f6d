"""Generative adversarial distillation: its own options, and the settings of its paper (2511.10643) for what a run leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from bbopd.config_base import Fraction, Section

# By section. What a run gives itself stays; `objective.temperature` follows `rollouts.temperature`.
GAD_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "objective": {"ce_weight": 1.0, "kd_weight": 1.0, "ramp": 0, "t2_scaling": False},
    "rollouts": {"samples_per_prompt": 8, "temperature": 0.8, "on_policy_fraction": 1.0, "max_staleness": 0},
    "train": {"lr": 1e-6},
}


class GadConfig(Section):
    """``objective.name: gad``: the student against a discriminator that learns to tell its answers from the teacher's."""

    discriminator_lr: Annotated[float, Field(gt=0)] = 1e-6
    """Of the discriminator's AdamW, constant; one step an update cycle."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.001
    """Weight of the KL (estimate k3) to the student at the end of the warm-up."""
    frozen: bool = False
    """Leave the discriminator as the warm-up has made it: the game against a reward that stands still, for comparison."""
    length_alarm: Fraction = 0.5
    """The run says so where the student's answers are longer or shorter than the teacher's by more than this share."""


def with_gad_defaults(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` of a run as it is given, with `GAD_DEFAULTS` for what its sections leave open."""
    filled = dict(data)
    for name, defaults in GAD_DEFAULTS.items():
        given = data.get(name, {})
        given = given.model_dump(exclude_unset=True) if isinstance(given, Section) else dict(given)
        filled[name] = {**defaults, **given}
    filled["objective"].setdefault("temperature", filled["rollouts"]["temperature"])
    return filled
