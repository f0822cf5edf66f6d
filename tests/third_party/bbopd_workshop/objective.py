"""Both directions of the KL at once (Jeffreys 1946), weighed against each other."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from bbopd import DistillLoss, linear_distill
from bbopd.config import ObjectiveConfig, TeacherConfig
from bbopd.objectives import Facts
from bbopd.types import DistillBatch, Level, SignalSpec


class Jeffreys:
    FACTS = Facts(needs=("full",), computes="balance KL(p || q) + (1 - balance) KL(q || p), token by token", source="Jeffreys 1946")

    class Options(BaseModel):
        model_config = ConfigDict(extra="forbid")

        balance: Annotated[float, Field(ge=0, le=1)] = 0.5

    name = "jeffreys"

    def __init__(self, config: ObjectiveConfig, options: Options) -> None:
        self._temperature, self._t2_scaling, self._balance = config.temperature, config.t2_scaling, options.balance

    @property
    def needs(self) -> tuple[Level, ...]:
        return self.FACTS.needs

    def signal(self, teacher: TeacherConfig) -> SignalSpec:
        return SignalSpec("full")

    def loss(self, hidden_ND: Any, head: Any, batch: DistillBatch, *, ce_weight: float, kd_weight: float, normalizer: Any) -> DistillLoss:
        def one(divergence: str, ce: float, kd: float) -> DistillLoss:
            return linear_distill(
                hidden_ND,
                head.weight_VD,
                batch.teacher,
                batch.labels,
                temperature=self._temperature,
                t2_scaling=self._t2_scaling,
                divergence=divergence,
                ce_weight=ce,
                kd_weight=kd,
                token_weight=batch.token_weight,
                normalizer=normalizer,
                **head.options,
            )

        forward = one("forward_kl", ce_weight, kd_weight * self._balance)
        reverse = one("reverse_kl", 0.0, kd_weight * (1 - self._balance))
        kd = self._balance * forward.kd + (1 - self._balance) * reverse.kd
        return replace(forward, loss=forward.loss + reverse.loss, kd=kd)
