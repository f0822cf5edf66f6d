"""Sequence-level distillation: cross-entropy on what the teacher writes itself (Kim & Rush 2016, section 3.2, with one answer a prompt).

It needs no vocabulary in common: answers travel as text.
"""

from __future__ import annotations

from dataclasses import dataclass

from bbopd.config import TeacherConfig
from bbopd.errors import ConfigError, TeacherError
from bbopd.objectives.sft import Sft
from bbopd.types import Level, SignalSpec, TeacherInfo


@dataclass(frozen=True, slots=True)
class SeqKD(Sft):
    """``ce_weight * CE`` on answers of the teacher's own."""

    @property
    def name(self) -> str:
        return "seqkd"

    @property
    def needs(self) -> tuple[Level, ...]:
        return ("text",)

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        self._require_text(teacher)
        return SignalSpec("text")

    def _require_text(self, teacher: TeacherConfig) -> None:
        if teacher.signal != "text":
            raise ConfigError(
                f"objective.name {self.name} learns from what the teacher writes, not from {teacher.signal}: set teacher.signal=text"
            )

    def check(self, info: TeacherInfo, want: SignalSpec) -> None:
        if info.offer("text") is None:
            offered = ", ".join(offer.level for offer in info.offers) or "nothing"
            raise TeacherError(
                f"{self.name} learns from what the teacher writes, but teacher {info.model} offers {offered}: take one that writes (text)"
            )
