"""What objective, teacher and sampling must have in common: pairs that do not go together are refused before anything is loaded."""

from __future__ import annotations

from bbopd.config_objective import ObjectiveConfig
from bbopd.config_rollouts import RolloutsConfig
from bbopd.config_teacher import TeacherConfig


def check_pairs(
    objective: ObjectiveConfig, teacher: TeacherConfig, rollouts: RolloutsConfig, *, writes_rollouts: bool, rollouts_per_cycle: int
) -> None:
    """Raises `ValueError` for an objective, a teacher and a way to sample that do not go together, with what would."""
    _check_signal(objective, teacher)
    _check_answers(objective, teacher)
    is_sampled = objective.name == "policy_gradient" or (objective.plugin_use is not None and teacher.signal == "sampled")
    if objective.judges_groups or is_sampled:
        _check_sampling(objective, rollouts, writes_rollouts)
    if objective.judges_groups:
        _check_groups(objective, rollouts, rollouts_per_cycle)
    if teacher.self is not None:
        _check_turns(objective, rollouts)
    _check_tokenizers(objective, teacher, rollouts, writes_rollouts)


def _check_signal(objective: ObjectiveConfig, teacher: TeacherConfig) -> None:
    """An objective hears what it can learn from."""
    if objective.name != "sft" and teacher.signal == "none":
        raise ValueError(f"objective {objective.name} needs a teacher: give teacher.target, teacher.serve or teacher.self")
    if (objective.learns_from_text or objective.name == "verbal") != (teacher.signal == "text") and objective.name != "sft":
        raise ValueError(
            f"objective.name {objective.name} with teacher.signal {teacher.signal}: seqkd, gad and verbal learn from what the "
            "teacher writes (text), the divergences from its signal on tokens (full, candidates, topk); set objective.name=seqkd with "
            "teacher.signal=text, or neither of them"
        )
    if teacher.signal in ("candidates", "topk") and objective.name != "sft" and objective.temperature != 1.0:
        raise ValueError(
            f"objective.temperature {objective.temperature} with teacher.topk: the top ids hold too little of the mass above "
            "temperature 1; set objective.temperature=1, or teacher.signal=full"
        )
    if objective.name == "policy_gradient" and objective.baseline == "kl" and teacher.signal == "sampled":
        raise ValueError(
            "objective.baseline kl with teacher.signal sampled: the baseline is a KL, which takes more than one logprob a token; "
            "set teacher.signal=full or candidates, teacher.topk, or objective.baseline=none"
        )


def _check_answers(objective: ObjectiveConfig, teacher: TeacherConfig) -> None:
    """What the teacher writes has a use, as have a rubric and the choice among several answers."""
    answers, grading = teacher.answers, teacher.grading
    if teacher.writes_labels and teacher.signal == "none":
        raise ValueError("teacher.writes_labels without a signal of the teacher: for its text alone set objective.name=seqkd")
    if answers.best_by is not None and objective.name != "seqkd":
        raise ValueError(
            f"teacher.answers.best_by {answers.best_by} chooses among the teacher's answers, from which objective.name "
            f"{objective.name} does not learn: leave it out, or set objective.name=seqkd"
        )
    if objective.judges_groups and teacher.writes_labels:
        raise ValueError(f"teacher.writes_labels: for objective.name {objective.name} the teacher grades answers and writes none")
    if (objective.name == "verbal" or answers.best_by == "grade") != (grading is not None):
        raise ValueError(
            f"objective.name {objective.name} with{'out' if grading is None else ''} teacher.grading: a rubric belongs to "
            "objective.name=verbal and to teacher.answers.best_by=grade, and these need one"
        )


def _check_sampling(objective: ObjectiveConfig, rollouts: RolloutsConfig, writes_rollouts: bool) -> None:
    """A policy gradient is one of the distribution that was sampled from."""
    if not writes_rollouts:
        raise ValueError(f"objective.name {objective.name} learns from rollouts alone: set rollouts.on_policy_fraction above 0")
    if rollouts.top_p < 1.0 or rollouts.top_k:
        raise ValueError(
            f"objective.name {objective.name} with rollouts.top_p {rollouts.top_p} and top_k {rollouts.top_k}: tokens cut off by them "
            "have no probability, so that the gradient would be of another distribution; set top_p=1 and top_k=0"
        )
    if rollouts.temperature != objective.temperature:
        raise ValueError(
            f"objective.name {objective.name} at objective.temperature {objective.temperature} with rollouts.temperature "
            f"{rollouts.temperature}: the gradient holds for tokens sampled at the objective's own temperature; set both to the same, "
            "objective.temperature=1 and rollouts.temperature=1 say"
        )


def _check_groups(objective: ObjectiveConfig, rollouts: RolloutsConfig, rollouts_per_cycle: int) -> None:
    """Answers to one prompt can be judged beside each other."""
    if isinstance(rollouts.on_policy_fraction, tuple):
        raise ValueError(
            f"objective {objective.name} needs whole groups in every cycle: set rollouts.on_policy_fraction, which goes from "
            f"{rollouts.on_policy_fraction[0]:g} to {rollouts.on_policy_fraction[1]:g}, to one number"
        )
    if rollouts.samples_per_prompt < 2 or rollouts_per_cycle % rollouts.samples_per_prompt:
        raise ValueError(
            f"objective {objective.name} compares the answers to one prompt: rollouts.samples_per_prompt {rollouts.samples_per_prompt} "
            f"must be 2 or more, and a divisor of the {rollouts_per_cycle} rollouts of an update cycle (rollouts.per_update x "
            "on_policy_fraction)"
        )


def _check_turns(objective: ObjectiveConfig, rollouts: RolloutsConfig) -> None:
    """One model writes, and is asked what it thinks of it."""
    if rollouts.engine == "hf" and rollouts.max_staleness:
        raise ValueError(
            "teacher.self with rollouts.engine hf: the student cannot write and be asked about it at the same time; set "
            "rollouts.max_staleness=0"
        )
    if objective.name == "aligned":
        raise ValueError("teacher.self has the student's own tokens, so there is nothing to align: take another objective")


def _check_tokenizers(objective: ObjectiveConfig, teacher: TeacherConfig, rollouts: RolloutsConfig, writes_rollouts: bool) -> None:
    """A tokenizer is named where text is written in the teacher's tokens, and nowhere else."""
    if objective.name != "aligned":
        if teacher.tokenizer is not None and not teacher.is_api:
            raise ValueError(
                f"teacher.tokenizer is for an OpenAI-compatible target, or for objective.name=aligned: objective {objective.name} takes a "
                "teacher with the student's own tokens; leave it out"
            )
        return
    if teacher.tokenizer is None and teacher.serve is None:
        raise ValueError(
            "objective aligned writes the student's text in the teacher's tokens: set teacher.tokenizer to the Hub id, or a folder, of "
            "the teacher's tokenizer"
        )
    is_whole = rollouts.top_p == 1 and rollouts.top_k == 0 and rollouts.temperature == objective.temperature
    if writes_rollouts and objective.span_weight and not is_whole:
        raise ValueError(
            f"objective aligned weighs sampled spans by their probability at objective.temperature {objective.temperature}, but "
            f"rollouts are sampled at temperature {rollouts.temperature}, top_p {rollouts.top_p}, top_k {rollouts.top_k}: set "
            "rollouts.temperature to the same, top_p=1 and top_k=0, or objective.span_weight=0"
        )
