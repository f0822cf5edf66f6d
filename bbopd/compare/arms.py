"""What the known arms change of a run: where the text comes from that the student learns on, and what it is told of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bbopd.config import RunConfig
from bbopd.config_compare import KNOWN_ARMS, ArmConfig, EqualBudget, KnownArm
from bbopd.config_file import parse_config, with_value
from bbopd.errors import ConfigError

_CROSS_ENTROPY = ("none", "sft", "seqkd")
_WITHOUT_DIVERGENCE = ("sft", "seqkd", "gad", "verbal")


def known_arm(name: str, arm: ArmConfig) -> KnownArm | None:
    """The known arm that ``arm`` begins as; None where it begins as the run itself."""
    return arm.like or next((known for known in KNOWN_ARMS if known == name), None)


def matters(key: str, known: KnownArm | None, arm: ArmConfig) -> bool:
    """Whether a swept ``key`` changes what ``arm`` does: it is not set by the arm, and not of a part that the arm does without."""
    if known == "none" or key in arm.set:
        return False
    if known in _CROSS_ENTROPY and key.startswith("objective."):
        return False
    return not (known in (*_CROSS_ENTROPY, "off_policy") and key.startswith("rollouts.") and key != "rollouts.per_update")


def run_config(base: Mapping[str, Any], known: KnownArm | None, values: Mapping[str, Any], budget: EqualBudget, where: str) -> RunConfig:
    """``base`` as a run of the arm, ``values`` laid over that and ``budget`` over all. Raises `ConfigError`, beginning with ``where``."""
    data = dict(base)
    for key, value in {**_changes(base, known, where), **values}.items():
        data = with_value(data, key, value, where)
    for key, value in _spending(parse_config(_affordable(data), (), RunConfig, where), known, budget, where).items():
        data = with_value(data, key, value, where)
    return parse_config(data, (), RunConfig, where)


def _changes(base: Mapping[str, Any], known: KnownArm | None, where: str) -> dict[str, Any]:
    if known is None:
        return {}
    if known in ("none", "sft"):
        return {"objective": {"name": "sft"}, "rollouts.on_policy_fraction": 0.0}
    if known == "seqkd":
        return {"objective": {"name": "seqkd"}, "rollouts.on_policy_fraction": 0.0, "teacher.signal": "text"}
    name = (base.get("objective") or {}).get("name", "forward_kl")
    if name in _WITHOUT_DIVERGENCE:
        raise ConfigError(f"{where} learns from a divergence, but the base has objective.name {name}: set it to forward_kl, say")
    if known == "off_policy":
        return {"rollouts.on_policy_fraction": 0.0}
    if known == "on_policy":
        return {"rollouts.on_policy_fraction": 1.0, "objective.ramp": 0}
    fraction = (base.get("rollouts") or {}).get("on_policy_fraction", 0.5)
    is_mixed = isinstance(fraction, list | tuple) or 0 < fraction < 1
    return {"rollouts.on_policy_fraction": fraction if is_mixed else 0.5}


def _affordable(data: Mapping[str, Any]) -> dict[str, Any]:
    """``data`` with a budget beyond any, so that the rest of it can be read."""
    return {**data, "train": {**(data.get("train") or {}), "on_policy_tokens": 10**12, "labelled_tokens": 10**12, "total_steps": None}}


def _spending(config: RunConfig, known: KnownArm | None, budget: EqualBudget, where: str) -> dict[str, Any]:
    """The keys by which a run spends ``budget``."""
    if known == "none":
        return {"train.labelled_tokens": 0, "train.total_steps": None, "train.warmup": 0}
    fraction = config.rollouts.on_policy_fraction
    share = sum(fraction) / 2 if isinstance(fraction, tuple) else fraction
    if budget.tokens is not None:
        if config.writes_rollouts:
            return {"train.on_policy_tokens": max(1, round(budget.tokens * share)), "train.total_steps": None}
        return {"train.labelled_tokens": budget.tokens, "train.total_steps": None}
    assert budget.updates is not None, "one of the two is given"
    if isinstance(fraction, tuple):
        raise ConfigError(
            f"{where}: rollouts.on_policy_fraction goes from {fraction[0]:g} to {fraction[1]:g} as tokens are trained: give budget.tokens"
        )
    tokens = 2 * budget.updates * config.train.batch_tokens  # more than so many updates take
    return {"train.labelled_tokens": tokens, "train.on_policy_tokens": tokens, "train.total_steps": budget.updates}
