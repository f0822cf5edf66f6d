"""Sequence-level distillation: cross-entropy on what the teacher writes itself (Kim & Rush 2016, section 3.2, with one answer a prompt).

It needs no vocabulary in common: answers travel as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from bbopd.config import TeacherConfig
from bbopd.objectives.base import Facts
from bbopd.objectives.sft import Sft
from bbopd.types import Level, SignalSpec

FACTS = Facts(
    needs=("text",),
    computes="cross-entropy on answers that the teacher writes",
    source="Kim & Rush 2016, 1606.07947, section 3.2",
    teacher_work="writes an answer to each prompt, once; with answers.samples several",
    same_tokens=False,
)


@dataclass(frozen=True, slots=True)
class SeqKD(Sft):
    """``ce_weight * CE`` on answers of the teacher's own."""

    @property
    def name(self) -> str:
        return "seqkd"

    @property
    def needs(self) -> tuple[Level, ...]:
        return FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return SignalSpec("text")
