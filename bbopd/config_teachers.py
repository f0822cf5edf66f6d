"""Several teachers in one run: what they must have in common, and which objectives can hear more than one about a prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bbopd.config_data import PromptSource
from bbopd.config_objective import ObjectiveConfig
from bbopd.config_teacher import OWN_TEACHER, TeacherConfig

_OWN = ("serve", "self", "prices", "budget", "grading", "answers", "writes_labels")  # settings of ``teacher`` alone


def check_teachers(
    own: TeacherConfig, others: Mapping[str, TeacherConfig], sources: Sequence[PromptSource], objective: ObjectiveConfig
) -> None:
    """Raises `ValueError` for teachers that do not go together with each other, with the sources that name them or with the objective."""
    named = {name for source in sources for name in source.teachers}
    if unknown := sorted(named - {OWN_TEACHER, *others}):
        known = ", ".join([OWN_TEACHER, *sorted(others)])
        raise ValueError(f"data.prompts names teacher {unknown[0]}, which is none of {known}: add it to teachers")
    if idle := sorted(set(others) - named):
        raise ValueError(f"teachers.{idle[0]} is asked about nothing: name it in teachers of one of data.prompts, or leave it out")
    if not named:
        return
    if own.signal in ("none", "text") or objective.name == "aligned":
        raise ValueError(
            f"several teachers with objective.name {objective.name} and teacher.signal {own.signal}: they are heard by their signals on "
            "the student's own tokens (full, candidates, topk, sampled)"
        )
    for name, other in others.items():
        if (other.signal, other.topk) != (own.signal, own.topk):
            raise ValueError(
                f"teachers.{name} is asked for {other.signal} (topk {other.topk}), teacher for {own.signal} (topk {own.topk}): a batch has "
                "one kind of signal; give both the same"
            )
        if changed := [key for key in _OWN if getattr(other, key) != type(other).model_fields[key].default]:
            raise ValueError(
                f"teachers.{name}.{changed[0]}: only teacher has that; a named teacher is a running one that costs nothing (target, model, "
                "tls, tokens, cache)"
            )
        if len(other.targets) > 1:
            raise ValueError(f"teachers.{name} has {len(other.targets)} targets: replicas are compared of teacher alone; give it one")
    for source in sources:
        if len(source.teachers) > 1 and not (objective.name == "policy_gradient" and own.signal == "sampled"):
            raise ValueError(
                f"data.prompts {source.name} names {len(source.teachers)} teachers: one logprob a token can be weighed between them "
                f"(objective.name=policy_gradient with teacher.signal=sampled), {objective.name} with {own.signal} cannot; name one"
            )
