"""Every option of a run, as one model. Imports no torch, so that the command line stays quick.

What a run needs is checked here, all of it, before anything is loaded or spent; `config_file` reads it from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from bbopd.config_base import Options, Section, known_in
from bbopd.config_cluster import ClusterConfig, NeedsConfig, ScaleConfig
from bbopd.config_data import DataConfig, FiltersConfig, PromptSource
from bbopd.config_eval import EvalConfig
from bbopd.config_gad import GadConfig, with_gad_defaults
from bbopd.config_objective import ObjectiveConfig, value_at
from bbopd.config_pairs import check_pairs
from bbopd.config_rollouts import EngineAgreementConfig, RolloutsConfig, SampleServerConfig
from bbopd.config_student import InitConfig, LoRAConfig, StudentConfig
from bbopd.config_teacher import (
    AnswersConfig,
    ApiConfig,
    BudgetConfig,
    CacheConfig,
    ClientTlsConfig,
    PricesConfig,
    SelfConfig,
    ServeConfig,
    ServerTlsConfig,
    TeacherConfig,
)
from bbopd.config_teachers import check_teachers
from bbopd.config_train import ParallelConfig, TrainConfig, resolve_steps
from bbopd.plugins import GROUPS, PluginUse, TrackerName

__all__ = [
    "AnswersConfig",
    "ApiConfig",
    "BudgetConfig",
    "CacheConfig",
    "ClientTlsConfig",
    "ClusterConfig",
    "DataConfig",
    "EngineAgreementConfig",
    "EvalConfig",
    "FiltersConfig",
    "GadConfig",
    "InitConfig",
    "LoRAConfig",
    "NeedsConfig",
    "ObjectiveConfig",
    "ParallelConfig",
    "PricesConfig",
    "PromptSource",
    "RolloutsConfig",
    "RunConfig",
    "SampleServerConfig",
    "ScaleConfig",
    "SelfConfig",
    "ServeConfig",
    "ServerTlsConfig",
    "StudentConfig",
    "TeacherConfig",
    "TrainConfig",
    "resolve_steps",
]


class RunConfig(Section):
    """One run: ``bbopd distill run.yaml``."""

    student: StudentConfig
    """The model that learns."""
    teacher: TeacherConfig = TeacherConfig(signal="none")
    """The model that is asked; a run of ``objective.name: sft`` needs none."""
    teachers: Mapping[Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")], TeacherConfig] = Field(default_factory=dict)
    """More teachers, by the names that ``data.prompts`` calls them; each with the tokens of ``teacher``, and asked for the same signal."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """How the student writes."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """What is minimised."""
    train: TrainConfig = TrainConfig()
    """How the student is updated, and for how long."""
    data: DataConfig = DataConfig()
    """Where prompts come from, and which answers are worth a teacher's time."""
    eval: EvalConfig = EvalConfig()
    """What is measured of the student while it trains."""
    cluster: ClusterConfig = ClusterConfig()
    """What ``bbopd distill --ray`` asks a Ray cluster for; without it nobody reads this."""
    output: str = "runs/latest"
    """The run's folder: metrics, checkpoints, the report and, at the end, the student in ``model/``; a stopped run goes on from it."""
    track: tuple[Annotated[TrackerName | str, known_in("trackers")], ...] = ()
    """Experiment trackers that hear the figures too, beside TensorBoard; each is set up by its own environment variables. Plug-ins too."""
    track_options: Mapping[str, Options] = Field(default_factory=dict)
    """Of trackers that are plug-ins, by their names: what each knows, as it documents it."""

    @field_validator("track")
    @classmethod
    def _tracks_once(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(value)) < len(value):
            raise ValueError(f"each tracker hears a run once: name {', '.join(dict.fromkeys(value))}, and none of them twice")
        return value

    @model_validator(mode="after")
    def _options_have_a_tracker(self) -> RunConfig:
        takers = [name for name in self.track if name not in GROUPS["trackers"].built_in]
        if idle := [name for name in self.track_options if name not in takers]:
            raise ValueError(
                f"track_options.{idle[0]}: options are for trackers in track that are plug-ins, which are {', '.join(takers) or 'none'}"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _settings_of_the_paper(cls, data: Any) -> Any:
        objective = data.get("objective") if isinstance(data, dict) else None
        name = objective.get("name") if isinstance(objective, dict) else getattr(objective, "name", None)
        return with_gad_defaults(data) if name == "gad" else data

    @model_validator(mode="before")
    @classmethod
    def _teachers_are_asked_alike(cls, data: Any) -> Any:
        """``teachers`` are asked for the signal of ``teacher``, where they do not say another."""
        if not isinstance(data, dict) or not isinstance(data.get("teacher"), dict) or not isinstance(data.get("teachers"), dict):
            return data
        asked = {key: data["teacher"][key] for key in ("signal", "topk") if key in data["teacher"]}
        named = {name: {**asked, **one} if isinstance(one, dict) else one for name, one in data["teachers"].items()}
        return {**data, "teachers": named}

    @model_validator(mode="after")
    def _teachers_fit(self) -> RunConfig:
        check_teachers(self.teacher, self.teachers, self.data.prompts, self.objective)
        return self

    @model_validator(mode="after")
    def _cluster_fits(self) -> RunConfig:
        rollouts, engines = self.rollouts, self.cluster.engines
        if engines[1] and (rollouts.engine != "vllm" or rollouts.is_elsewhere or rollouts.sleep):
            raise ValueError(
                f"cluster.engines {engines[0]} to {engines[1]} starts servers for rollouts.engine vllm, with neither a target nor sleep: "
                "set rollouts.engine=vllm and leave these out, or cluster.engines=0"
            )
        if self.cluster.scale is not None and not rollouts.max_staleness:
            raise ValueError(
                "cluster.scale with rollouts.max_staleness 0: trainer and engines wait for each other in turn, which says nothing of how "
                "many there should be; set max_staleness=1, or leave scale out"
            )
        return self

    @model_validator(mode="after")
    def _game_is_fair(self) -> RunConfig:
        objective, rollouts = self.objective, self.rollouts
        if objective.name != "gad":
            if self.eval.judge is not None:
                raise ValueError(f"eval.judge compares answers in a run of objective.name=gad, not of {objective.name}: leave it out")
            return self
        if rollouts.max_staleness:
            raise ValueError("gad trains its discriminator between two cycles: set rollouts.max_staleness=0")
        if not self.train.cold_start_tokens:
            raise ValueError(
                "gad begins with a warm-up, of the student on the teacher's answers and of the discriminator on both: set "
                "train.cold_start_tokens (the paper: one epoch)"
            )
        if objective.ramp:
            raise ValueError("gad has nothing to ramp: set objective.ramp=0")
        return self

    @model_validator(mode="after")
    def _pairs_fit(self) -> RunConfig:
        check_pairs(
            self.objective,
            self.teacher,
            self.rollouts,
            writes_rollouts=self.writes_rollouts,
            rollouts_per_cycle=self.rollouts_per_cycle,
        )
        return self

    @model_validator(mode="after")
    def _budgets_fit(self) -> RunConfig:
        objective, train, rollouts = self.objective, self.train, self.rollouts
        if self.writes_rollouts and objective.weights[1] == 0:
            raise ValueError("the KD weight is 0, so rollouts would teach nothing: lower objective.alpha, or take objective.name=sft")
        if self.writes_rollouts and train.on_policy_tokens == 0:
            raise ValueError("train.on_policy_tokens is 0: set a budget, or rollouts.on_policy_fraction=0 for a run without rollouts")
        if not self.writes_rollouts and train.labelled_tokens is None and train.total_steps is None:
            raise ValueError("a run without rollouts needs train.labelled_tokens or train.total_steps as its budget")
        if rollouts.max_new_tokens >= train.max_seq_len:
            raise ValueError(
                f"rollouts.max_new_tokens {rollouts.max_new_tokens} leaves no room for a prompt within train.max_seq_len "
                f"{train.max_seq_len}"
            )
        if self.writes_rollouts and round(rollouts.per_update * max(self._fractions)) < 1:
            raise ValueError(
                f"rollouts.per_update {rollouts.per_update} x on_policy_fraction {rollouts.on_policy_fraction} is no rollout at all"
            )
        has_ramp = objective.ramp > 0 and not objective.is_cross_entropy
        if has_ramp and min(self._fractions) == 1.0 and train.cold_start_tokens == 0:
            raise ValueError(
                "objective.ramp without labelled tokens only rescales one loss, which AdamW cancels: set objective.ramp=0, "
                "or rollouts.on_policy_fraction below 1"
            )
        steps = self.planned_steps
        for key, value in (("objective.ramp", objective.ramp if has_ramp else 0), ("train.warmup", train.warmup)):
            if resolve_steps(value, steps) > steps:
                raise ValueError(
                    f"{key} is {value} steps, but the budgets allow about {steps} steps of {train.batch_tokens} tokens: "
                    "raise train.on_policy_tokens, or give it as a fraction of the run (0.1)"
                )
        return self

    @property
    def writes_rollouts(self) -> bool:
        return not self.objective.is_cross_entropy and max(self._fractions) > 0

    @property
    def plugins(self) -> tuple[PluginUse, ...]:
        """What of the run other packages bring."""
        teachers = [teacher.plugin_use for teacher in (self.teacher, *self.teachers.values())]
        trackers = [name for name in self.track if name not in GROUPS["trackers"].built_in]
        return (
            *(use for use in (*teachers, self.rollouts.plugin_use, self.objective.plugin_use) if use is not None),
            *self.data.filters.plugin_uses,
            *(PluginUse("trackers", name, self.track_options.get(name, {}), f"track_options.{name}") for name in trackers),
        )

    @property
    def names_teachers(self) -> bool:
        """Whether a source of prompts says who is asked about it."""
        return any(source.teachers for source in self.data.prompts)

    @property
    def candidates(self) -> int:
        """Ids of every response token that the student has its teacher asked about; 0 where the teacher needs none."""
        return self.teacher.topk if self.teacher.signal == "candidates" and not self.objective.is_cross_entropy else 0

    def rollouts_at(self, progress: float) -> int:
        """Rollouts of a cycle when ``progress`` (0 to 1) of the on-policy tokens is trained; the others of ``per_update`` are labelled."""
        share = value_at(self.rollouts.on_policy_fraction, progress)
        return max(1, round(self.rollouts.per_update * share)) if self.writes_rollouts else 0

    @property
    def rollouts_per_cycle(self) -> int:
        """About as many in the mean over the run."""
        return self.rollouts_at(0.5)

    @property
    def most_labelled(self) -> int:
        """Labelled sequences of a cycle, where there are most."""
        return self.rollouts.per_update - min(self.rollouts_at(0.0), self.rollouts_at(1.0))

    @property
    def teacher_writes(self) -> bool:
        """Whether labelled sequences are answers of the teacher's own."""
        return self.objective.learns_from_text or (self.teacher.writes_labels and self.objective.name != "sft")

    @property
    def _fractions(self) -> tuple[float, float]:
        fraction = self.rollouts.on_policy_fraction
        return fraction if isinstance(fraction, tuple) else (fraction, fraction)

    @property
    def planned_steps(self) -> int:
        """Optimizer steps that the budgets allow where every answer is as long as it may be; shorter answers make more of them."""
        train, rollouts = self.train, self.rollouts
        on_policy = self.rollouts_per_cycle * rollouts.max_new_tokens
        labelled = rollouts.per_update * (self.teacher.answers.max_new_tokens if self.teacher_writes else self.data.response_tokens)
        steps = _cycles(train.cold_start_tokens, labelled) * self._steps_of(labelled)
        if self.writes_rollouts:
            mixed = on_policy + (rollouts.per_update - self.rollouts_per_cycle) * labelled // rollouts.per_update
            steps += _cycles(train.on_policy_tokens, on_policy) * self._steps_of(mixed)
        elif train.labelled_tokens is not None:
            steps += _cycles(train.labelled_tokens, labelled) * self._steps_of(labelled)
        else:
            steps += train.total_steps or 0
        return max(1, min(steps, train.total_steps) if train.total_steps else steps)

    def _steps_of(self, cycle_tokens: int) -> int:
        return max(1, round(cycle_tokens / self.train.batch_tokens))


def _cycles(budget: int, cycle_tokens: int) -> int:
    return math.ceil(budget / max(1, cycle_tokens))
