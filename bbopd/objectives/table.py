"""The table of objectives, and by it: which of them a teacher can serve, and the refusal of a pair that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives import aligned, gad, mixed, sampled_kl, seqkd, sft, token_level, verbal
from bbopd.objectives.base import Facts, Objective
from bbopd.plugins import Plugin
from bbopd.types import Level, SignalSpec, TeacherInfo

FACTS: Mapping[str, Facts] = {
    **token_level.FACTS,
    "mixed": mixed.FACTS,
    "aligned": aligned.FACTS,
    "policy_gradient": sampled_kl.FACTS,
    "sft": sft.FACTS,
    "seqkd": seqkd.FACTS,
    "verbal": verbal.FACTS,
    "gad": gad.FACTS,
}
"""What there is to know of each, by the name in ``objective.name``."""

OBJECTIVES: Mapping[str, Callable[[ObjectiveConfig], Objective]] = {
    **dict.fromkeys(token_level.FACTS, token_level.TokenLevel),
    "mixed": mixed.Mixed,
    "aligned": aligned.Aligned,
    "policy_gradient": sampled_kl.SampledKL,
    "sft": sft.Sft,
    "seqkd": seqkd.SeqKD,
    "verbal": verbal.Verbal,
    "gad": gad.Gad,
}

_TOKEN_LEVELS: tuple[Level, ...] = ("full", "candidates", "topk", "sampled")


def make_objective(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` names, with its settings. Raises `ConfigError` for a plug-in that does not work."""
    use = config.plugin_use
    if use is None:
        return OBJECTIVES[config.name](config)
    plugin = use.check()
    plugin_facts(plugin)
    made: Objective = use.make(config)
    plugin.require(made, ("name", "needs"))
    return made


def plugin_facts(plugin: Plugin) -> Facts:
    """What an objective of another package says of itself. Raises `ConfigError` where that is not what the loop can serve."""
    facts = plugin.load().FACTS  # type: ignore[attr-defined]
    if not isinstance(facts, Facts):
        raise ConfigError(f"{plugin}: {plugin.value}.FACTS is {facts!r}, and no bbopd.objectives.Facts")
    if not facts.needs or set(facts.needs) - set(_TOKEN_LEVELS):
        raise ConfigError(
            f"{plugin}: {plugin.value}.FACTS.needs is {facts.needs!r}; a plug-in hears the teacher's signals on tokens, "
            f"one or more of {', '.join(_TOKEN_LEVELS)}"
        )
    return facts


def fitting(levels: Collection[Level], known: Mapping[str, Facts] = FACTS) -> dict[str, tuple[Level, ...]]:
    """Of every objective in ``known`` the levels among ``levels`` that it can use, the best first; those that can use none are left out."""
    usable = {name: tuple(level for level in facts.needs if level in levels) for name, facts in known.items()}
    return {name: found for name, found in usable.items() if found or not known[name].needs}


def signal_for(objective: Objective, teacher: TeacherConfig) -> SignalSpec | None:
    """What ``objective`` asks of the teacher for every response token; None where it asks nothing.

    Raises
    ------
    ConfigError
        ``teacher.signal`` is a level that it cannot use; names those that it can, and the objectives that can use this one.
    """
    level = teacher.signal
    if not objective.needs:
        return None
    if level not in objective.needs:
        usable = fitting([level] if level != "none" else [])
        others = [name for name, found in usable.items() if found and name != objective.name] or ["sft"]
        raise ConfigError(
            f"objective.name {objective.name} cannot use teacher.signal {level}: set teacher.signal to "
            f"{' or '.join(objective.needs)}, or objective.name to {' or '.join(others)}"
        )
    return objective.signal(teacher)


def check_offer(objective: Objective, info: TeacherInfo, want: SignalSpec) -> None:
    """Refuse a teacher that does not offer ``want`` exactly, before anything is spent on it.

    Raises
    ------
    TeacherError
        Level, temperature or ``top_k`` are not offered; names what would fit.
    """
    name, offer = objective.name, info.offer(want.level)
    if offer is None:
        offered = [one.level for one in info.offers]
        served = [f"{level} for {', '.join(name for name, usable in fitting([level]).items() if usable)}" for level in offered]
        raise TeacherError(
            f"{name} asks for the {want.level} signal, but teacher {info.model} offers {', '.join(offered) or 'nothing'}: take another "
            f"teacher, or set teacher.signal and objective.name to what fits: {'; '.join(served) or 'sft'}"
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
