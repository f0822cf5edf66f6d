"""What a run minimises."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bbopd.config_base import Fraction, Options, Section, StepsOrFraction, known_in
from bbopd.config_gad import GadConfig
from bbopd.plugins import GROUPS, ObjectiveName, PluginUse
from bbopd.types import Divergence

ClipSide = Annotated[float, Field(gt=0, lt=1)]
Weight = Annotated[float, Field(ge=0)]
Skew = Annotated[float, Field(gt=0, lt=1)]


class SideConfig(Section):
    """One side of ``objective.name: mixed``. Two numbers are those of the run's beginning and end, with a straight line between them."""

    name: Divergence
    """The divergence of this side."""
    weight: Weight | tuple[Weight, Weight] = 1.0
    """Times kd_weight, which both sides have in common."""
    skew: Skew | tuple[Skew, Skew] = 0.1
    """Share of the other distribution that is mixed in (lambda of DistiLLM), for the skewed divergences."""
    beta: Fraction = 0.5
    """Of ``jsd``: the teacher's share in the mixture."""
    gap: Annotated[float, Field(gt=0, lt=1)] | None = None
    """A skew for every sample (DistiLLM-2): at a lead of this much in probability a sample has ``skew``, nearer ones less, down to 0.01.
    The mean lead, by which to choose it, is in the metrics. None: one skew for all."""

    @model_validator(mode="after")
    def _gap_has_a_skew(self) -> SideConfig:
        if self.gap is not None and self.name not in ("skew_forward_kl", "skew_reverse_kl"):
            raise ValueError(f"gap gives every sample a skew, which {self.name} does not have: leave it out, or take a skewed divergence")
        return self


def value_at(value: float | tuple[float, float], progress: float) -> float:
    """``value`` when ``progress`` (0 to 1) of the run is done."""
    first, last = value if isinstance(value, tuple) else (value, value)
    return first + (last - first) * min(1.0, progress)


class ObjectiveConfig(Section):
    """What is minimised: ``ce_weight * CE + kd_weight * T^2 * KD``."""

    name: Annotated[ObjectiveName | str, known_in("objectives")] = "forward_kl"
    """A divergence; ``mixed``, one on labelled sequences and another on rollouts; ``policy_gradient``, reverse KL from one logprob of the
    teacher for each sampled token; ``aligned``, for a teacher with another tokenizer; or cross-entropy alone: ``sft`` on labelled text,
    without a teacher, ``seqkd`` on answers that the teacher writes; or ``verbal``: policy gradient on grades that the teacher gives to the
    student's answers; or ``gad``: the student's answers against the teacher's, by a discriminator that learns to tell them apart. Or the
    name of a plug-in, an objective on the teacher's signals on tokens."""
    options: Options = Field(default_factory=dict)
    """Of a plug-in: what it knows, as it documents it."""
    labelled: SideConfig = SideConfig(name="skew_forward_kl")
    """Of ``mixed``, with ``rollouts``. Their defaults are DistiLLM-2's (2503.07067)."""
    rollouts: SideConfig = SideConfig(name="skew_reverse_kl")
    """Of ``mixed``: the side of the student's own answers."""
    alpha: Fraction | None = None
    """Short for ce_weight = alpha, kd_weight = 1 - alpha. 0.5 where nothing is given."""
    ce_weight: Annotated[float, Field(ge=0)] | None = None
    """Factor of cross-entropy on labelled tokens; with ``kd_weight`` in place of ``alpha``."""
    kd_weight: Annotated[float, Field(ge=0)] | None = None
    """Factor of the teacher's term, once the ramp has risen."""
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """T of both distributions in the teacher's term; above 1 only with ``teacher.signal: full``."""
    t2_scaling: bool = True
    """Multiply the teacher's term by T^2, so that its gradient keeps its size beside cross-entropy as T changes."""
    beta: Fraction = 0.5
    """Of ``jsd``: the teacher's share in the mixture. 0 is forward KL, 1 reverse KL."""
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Of the skewed divergences: share of the other distribution that is mixed in (lambda of DistiLLM)."""
    clip: ClipSide | tuple[ClipSide, Annotated[float, Field(gt=0)]] | None = 0.2
    """Of a policy gradient: how far the importance ratio may leave 1 before it stops counting, or ``[below, above]``. None: any way."""
    divide_by_std: bool = True
    """Where answers are judged: divide advantages by the standard deviation of their group's rewards (GRPO), or not (Dr. GRPO)."""
    kl_weight: Annotated[float, Field(ge=0)] = 0.0
    """Of ``verbal``: weight of the KL (estimate k3) to the student as it is when the run begins. ``gad`` has one of its own."""
    span_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of ``aligned``: the policy gradient on spans of text that are one token on neither side, beside the KL on common tokens."""
    rank_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of ``aligned``: the distance by rank where such a span begins."""
    discount: Fraction = 0.0
    """Of ``policy_gradient``: how much a token is credited with what follows it. 0 is the KL of each token, 1 that of the whole answer."""
    baseline: Literal["none", "kl"] = "none"
    """Of ``policy_gradient``. ``kl`` subtracts what the advantage is on average, -KL(q‖p): the same gradient on average, with less noise,
    for which the teacher must tell more than one logprob."""
    ramp: StepsOrFraction = 0.1
    """Steps, or share of the run, over which the ramp rises."""
    ramp_kind: Literal["kd_weight", "alpha"] = "kd_weight"
    """``kd_weight`` rises from 0 while ce_weight keeps its own; ``alpha`` is the literal reading: alpha rises from 0."""
    gad: GadConfig = GadConfig()
    """Of ``gad``."""

    @model_validator(mode="after")
    def _weights_given_once(self) -> ObjectiveConfig:
        if self.alpha is not None and (self.ce_weight is not None or self.kd_weight is not None):
            raise ValueError("give alpha, or ce_weight and kd_weight, not both")
        if self.ramp_kind == "alpha" and (self.ce_weight is not None or self.kd_weight is not None):
            raise ValueError("ramp_kind alpha needs alpha, not ce_weight and kd_weight")
        return self

    @model_validator(mode="after")
    def _options_belong_to_a_plugin(self) -> ObjectiveConfig:
        if self.options and self.plugin_use is None:
            raise ValueError(f"options belong to a plug-in, and {self.name} is none: its settings are keys of objective itself")
        return self

    @model_validator(mode="after")
    def _sides_belong_to_mixed(self) -> ObjectiveConfig:
        if self.name != "mixed" and self._changed("labelled", "rollouts"):
            raise ValueError(f"labelled and rollouts belong to objective.name=mixed, not {self.name}")
        if self.name == "mixed" and self._changed("beta", "skew"):
            raise ValueError("mixed has a beta and a skew for each side: set objective.labelled.skew and objective.rollouts.skew")
        return self

    @model_validator(mode="after")
    def _reference_belongs_to_verbal(self) -> ObjectiveConfig:
        if self.kl_weight and self.name != "verbal":
            other = "set objective.gad.kl_weight" if self.name == "gad" else "leave it out"
            raise ValueError(f"kl_weight belongs to objective.name=verbal, not {self.name}: {other}")
        return self

    def _changed(self, *names: str) -> bool:
        """Whether one of these is not its default; a resolved configuration names all of them."""
        return any(getattr(self, name) != type(self).model_fields[name].default for name in names)

    @property
    def plugin_use(self) -> PluginUse | None:
        """The objective, where another package brings it."""
        if self.name in GROUPS["objectives"].built_in:
            return None
        return PluginUse("objectives", self.name, self.options, "objective.options")

    @property
    def judges_groups(self) -> bool:
        """Whether the answers to one prompt are judged beside each other."""
        return self.name in ("verbal", "gad")

    @property
    def is_cross_entropy(self) -> bool:
        """Whether there is no signal on tokens, hence no KD and no rollouts."""
        return self.name in ("sft", "seqkd")

    @property
    def clip_range(self) -> tuple[float, float] | None:
        """How far below and above 1 an importance ratio may lie."""
        return (self.clip, self.clip) if isinstance(self.clip, float) else self.clip

    @property
    def learns_from_text(self) -> bool:
        """Whether all labels are answers that the teacher writes."""
        return self.name in ("seqkd", "gad")

    @property
    def weights(self) -> tuple[float, float]:
        """The targets (ce_weight, kd_weight), before any ramp."""
        if self.is_cross_entropy:
            return (1.0, 0.0)
        if self.ce_weight is not None or self.kd_weight is not None:
            return (self.ce_weight or 0.0, self.kd_weight or 0.0)
        alpha = 0.5 if self.alpha is None else self.alpha
        return (alpha, 1.0 - alpha)
