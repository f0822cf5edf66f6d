"""The options of an evaluation task: one YAML file beside its data."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator, model_validator

from bbopd.config_base import Positive, Section
from bbopd.config_teacher import TeacherConfig

Metric = Literal["exact_match", "f1", "rouge1", "rouge2", "rougeL", "rougeLsum", "bleu", "chrf"]
Kind = Literal["multiple_choice", "generation", "text", "judge", "agreement"]


class TaskConfig(Section):
    """What is asked of a model, row by row of a JSONL file, and how its answers are scored. Which fields are there says which kind it is:
    ``choices`` make it multiple choice, ``text`` held-out text, ``judge`` a comparison by a judge, ``teacher`` agreement with it, and
    ``answer`` alone generation.

    A *template* is Jinja over the fields of a row (``"{{question}}"``); the bare name of a field is its value, whatever that is.
    """

    task: str = ""
    """Its name in results; the file's own by default."""
    data: str
    """A JSONL file, from this file's folder."""
    prompt: str | None = None
    """Template of what the model is asked."""
    choices: str | tuple[str, ...] | None = None
    """Templates of the choices, or the name of a field that lists them."""
    answer: str | None = None
    """Template of the right answer: of multiple choice one of the choices or its number from 0, of generation also a field that lists
    several accepted ones; of a judged task the answer to compare with, where it is not the first model's."""
    text: str | None = None
    """Template of a text whose likelihood is measured."""
    cluster: str | None = None
    """Template of what items belong to that are not independent, such as their document."""
    delimiter: str = " "
    """Stands between the prompt and a choice."""
    metrics: tuple[Metric, ...] = ("exact_match", "f1")
    """Of generation."""
    max_new_tokens: Positive = 64
    """Tokens of an answer, at most."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer, and are no part of it."""
    chat: bool = False
    """Ask through the model's chat template, as a user."""
    window: Positive | None = None
    """Tokens of a window of ``text``; the model's positions, 2,048 at most, by default. Windows overlap by half."""
    limit: Positive | None = None
    """Only the first rows."""
    judge: TeacherConfig | None = None
    """Who compares two answers: a running teacher that replies in words."""
    teacher: TeacherConfig | None = None
    """Whose token distributions the model's are compared with, on ``answer`` after ``prompt`` and on answers of the model's own."""
    rollouts: Positive = 16
    """Answers of the model's own, to prompts spread evenly over the rows."""

    @field_validator("judge", mode="before")
    @classmethod
    def _judge_in_words(cls, value: Any) -> Any:
        return {"signal": "text", **value} if isinstance(value, dict) else value

    @property
    def kind(self) -> Kind:
        if self.judge is not None:
            return "judge"
        if self.teacher is not None:
            return "agreement"
        return "multiple_choice" if self.choices is not None else "text" if self.text is not None else "generation"

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> TaskConfig:
        needed = {
            "multiple_choice": ("prompt", "choices", "answer"),
            "generation": ("prompt", "answer"),
            "text": ("text",),
            "judge": ("prompt",),
            "agreement": ("prompt", "answer"),
        }[self.kind]
        if missing := [name for name in needed if getattr(self, name) is None]:
            raise ValueError(f"a task of kind {self.kind} needs {', '.join(needed)}: {' and '.join(missing)} missing")
        foreign = {
            "multiple_choice": ("text",),
            "generation": (),
            "text": ("prompt", "answer"),
            "judge": ("text", "choices", "teacher"),
            "agreement": ("text", "choices"),
        }[self.kind]
        if extra := [name for name in foreign if getattr(self, name) is not None]:
            raise ValueError(f"a task of kind {self.kind} has no {' or '.join(extra)}: leave it out")
        if self.choices is not None and not isinstance(self.choices, str) and len(self.choices) < 2:
            raise ValueError(f"choices {list(self.choices)} leave nothing to choose: give two or more")
        if not self.metrics or "" in self.stop:
            raise ValueError("metrics must name at least one, and stop holds no empty text")
        if self.window is not None and self.window < 2:
            raise ValueError(f"window {self.window} leaves no context: give at least 2")
        if self.judge is not None and (self.judge.target is None or self.judge.signal != "text" or self.judge.prices or self.judge.budget):
            raise ValueError("judge is a running teacher that replies in words: give its target, with no signal, prices or budget")
        if self.teacher is not None and (self.teacher.is_api or self.teacher.signal not in ("full", "topk")):
            raise ValueError("teacher is asked for its distributions over gRPC: give a grpc:// target, or serve, with signal full or topk")
        return self
