"""What ``bbopd compare`` compares: one run, the arms that differ from it, and what is the same for all of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from bbopd.config_base import Positive, Section

KnownArm = Literal["none", "sft", "seqkd", "off_policy", "on_policy", "mixed"]
KNOWN_ARMS: tuple[KnownArm, ...] = ("none", "sft", "seqkd", "off_policy", "on_policy", "mixed")
LOWER_IS_BETTER = ("bits_per_byte", "kl", "reverse_kl")  # measures that begin so; all others are shares
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


def is_share(measure: str) -> bool:
    """Whether ``measure``, or ``task.measure``, lies in [0, 1] and is better the higher it is; others are amounts, better the lower."""
    return not measure.rpartition(".")[2].startswith(LOWER_IS_BETTER)


class EqualBudget(Section):
    """What every arm may spend; the other three of tokens, updates, seconds and sequences of the teacher are reported."""

    tokens: Positive | None = None
    """Trained response tokens of a run, after its cold start."""
    updates: Positive | None = None
    """Optimizer steps of a run, its cold start included."""

    @model_validator(mode="after")
    def _one_of_them(self) -> EqualBudget:
        if (self.tokens is None) == (self.updates is None):
            raise ValueError("give exactly one of tokens and updates: the other follows from it")
        return self


class ArmConfig(Section):
    """One way to train the student."""

    like: KnownArm | None = None
    """The known arm that it begins as; None: the one of its own name, or, where its name is not known, the run as it is."""
    set: Mapping[str, Any] = {}
    """Keys of a run (``objective.temperature``) with their values, laid over that."""
    budget: EqualBudget | None = None
    """None: that of all arms."""


class MeasuresConfig(Section):
    """What decides, and on which questions."""

    test: str
    """JSONL lines with ``prompt`` or ``messages``; with ``answer`` for exact_match, with ``response`` for bits_per_byte. Or a task file of
    ``bbopd eval`` (YAML), whose metrics are then those to decide by."""
    development: str | None = None
    """The same, for choosing the learning rate; needed where there are several."""
    decide_by: str = "exact_match"
    """``exact_match``: the share of questions answered right, greedily; ``bits_per_byte``: of the responses; or a task's metric."""
    pattern: str | None = None
    """A regular expression; what its first group (or all of it) finds last in the text that was written is compared with ``answer``.
    None: all of the text, without white space around it."""
    max_new_tokens: Positive = 128
    """Tokens of an answer to a question, at most."""
    also: tuple[str, ...] = ()
    """Task files whose metrics are in the table too, as ``task.metric``: what else a model has gained or lost."""
    test_limit: Positive | None = None
    """The first so many of the questions; None: all."""
    development_limit: Positive | None = None
    """The same of the questions for choosing the learning rate."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Of every interval in the table."""

    @field_validator("pattern")
    @classmethod
    def _check_pattern(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is not a regular expression: {error}") from None
        return value

    @model_validator(mode="after")
    def _can_decide(self) -> MeasuresConfig:
        files = [self.test] if self.development is None else [self.test, self.development]
        are_tasks = {name.endswith((".yaml", ".yml")) for name in files}
        if len(are_tasks) > 1:
            raise ValueError(f"test {self.test} and development {self.development}: give two files of lines, or two task files")
        if are_tasks == {True} and self.pattern is not None:
            raise ValueError("pattern is for lines of questions: a task file says itself what an answer is")
        if are_tasks == {False} and self.decide_by not in ("exact_match", "bits_per_byte"):
            raise ValueError(
                f"decide_by {self.decide_by!r}: lines of questions tell exact_match and bits_per_byte; give a task file for more"
            )
        return self

    @property
    def is_task(self) -> bool:
        """Whether questions are task files."""
        return self.test.endswith((".yaml", ".yml"))


class CompareConfig(Section):
    """One comparison: ``bbopd compare compare.yaml``."""

    base: str | Mapping[str, Any]
    """A run: its file, or its sections."""
    arms: Mapping[str, ArmConfig]
    """By name; a list of known names says the same: none, sft, seqkd, off_policy, on_policy, mixed."""
    references: Mapping[str, str] = {}
    """Models that are measured and not trained: a name, and a hub id, folder or GGUF file."""
    sweep: Mapping[str, tuple[Any, ...]] = {}
    """Keys of a run with several values; every arm that the key matters to is trained with each, or with each combination."""
    learning_rates: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Tried in every arm with the first of ``seeds``; the best one on ``measures.development`` is taken. None: the run's own."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)
    """``train.seed`` of the runs of every arm."""
    budget: EqualBudget
    """What every arm may spend."""
    measures: MeasuresConfig
    """What decides, and on which questions."""
    pairs: tuple[tuple[str, str], ...] | None = None
    """Arms or references to be held against each other; None: each with each."""
    keep_models: bool = True
    """False removes a student once it is measured."""
    output: str = "runs/compare"
    """The comparison's folder: runs, measurements, the table and the page."""

    @field_validator("arms", mode="before")
    @classmethod
    def _names_alone(cls, value: Any) -> Any:
        if isinstance(value, list | tuple):
            return {name: {} for name in value}
        return {name: arm or {} for name, arm in value.items()} if isinstance(value, Mapping) else value

    @field_validator("arms", "references")
    @classmethod
    def _names_are_names(cls, value: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in value:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} becomes part of a file's name: use letters, digits, '_', '.' and '-'")
        return value

    @model_validator(mode="after")
    def _can_be_told_apart(self) -> CompareConfig:
        if not self.arms:
            raise ValueError(f"arms is empty: name some, {', '.join(KNOWN_ARMS)} say")
        unknown = [name for name, arm in self.arms.items() if name not in KNOWN_ARMS and arm == ArmConfig()]
        if unknown:
            raise ValueError(
                f"arm {unknown[0]!r} is not known ({', '.join(KNOWN_ARMS)} are): give it like or set, as `arms: {{NAME: {{...}}}}`"
            )
        twice = set(self.arms) & set(self.references)
        if twice:
            raise ValueError(f"{sorted(twice)[0]!r} is both an arm and a reference: call one of them otherwise")
        for title, values in (("seeds", self.seeds), ("learning_rates", self.learning_rates)):
            if len(set(values)) < len(values):
                raise ValueError(f"{title} {list(values)} names one of them twice")
        if not self.seeds:
            raise ValueError("seeds is empty: give one or more, [0, 1, 2] say")
        if len(self.learning_rates) > 1 and self.measures.development is None:
            raise ValueError("learning_rates are chosen among on questions of their own: give measures.development")
        if self.measures.development == self.measures.test:
            raise ValueError("measures.development is the test itself: a learning rate chosen on it would flatter its arm")
        empty = [key for key, values in self.sweep.items() if not values]
        if empty:
            raise ValueError(f"sweep.{empty[0]} is empty: give its values")
        return self
