"""The options of evaluations: what is measured in a run, how often, and which student of it is kept."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from bbopd.config_base import Positive, Section
from bbopd.config_teacher import TeacherConfig

MEASURES = (
    *("bits_per_byte", "kl_held_out", "kl_rollouts", "reverse_kl_held_out", "reverse_kl_rollouts"),
    *("top1_held_out", "top1_rollouts", "win_rate"),
)


class EvalConfig(Section):
    """What is measured of the student while it trains, and how often."""

    every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations; 0 evaluates at the start, after the cold start and at the end."""
    sequences: Positive = 16
    """Held-out sequences."""
    rollouts: Positive = 16
    """Rollouts written to measure the KL on the student's own text."""
    max_new_tokens: Positive = 128
    """Tokens of such a rollout, at most."""
    samples: Annotated[int, Field(ge=0)] = 3
    """Held-out prompts whose answers the report shows: the student's before and after, beside its teacher, and the teacher's own."""
    tasks: tuple[str, ...] = ()
    """Tasks to ask the student at every evaluation: paths of task files, JSONL files or texts, or names of lm-evaluation-harness."""
    keep_best: str | None = None
    """Keep the student of the best evaluation by this measure in ``best/`` of the run's folder: one of `MEASURES`, or ``TASK.METRIC``."""
    judge: TeacherConfig | None = None
    """Of a gad run: who compares the student's answers with the teacher's. ``target`` and how it is reached; its cost is not counted."""

    @field_validator("judge", mode="before")
    @classmethod
    def _judge_in_words(cls, value: Any) -> Any:
        return {"signal": "text", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _judge_is_there(self) -> EvalConfig:
        judge = self.judge
        if judge is not None and (judge.target is None or judge.signal != "text" or judge.prices or judge.budget):
            raise ValueError("judge is a running teacher that replies in words: give its target, with no signal, prices or budget")
        if self.keep_best is not None and self.keep_best not in MEASURES and not (self.tasks and "." in self.keep_best):
            raise ValueError(f"keep_best {self.keep_best} is no measure: take one of {', '.join(MEASURES)}, or TASK.METRIC of eval.tasks")
        if self.keep_best == "win_rate" and judge is None:
            raise ValueError("keep_best win_rate needs a judge: give judge.target")
        return self
