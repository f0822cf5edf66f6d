"""Options of training: the optimizer and its schedule, batches, budgets, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from bbopd.config_base import Fraction, Positive, Section, StepsOrFraction


class TrainConfig(Section):
    """How the student is updated, and for how long."""

    batch_tokens: Positive = 2048
    """Response tokens of one optimizer step, about."""
    micro_batch_tokens: Positive = 4096
    """Packed tokens, prompts included, of one forward and backward pass."""
    max_seq_len: Positive = 1024
    """Prompt and response together."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit`` keeps both moments in eight bits, a quarter of the memory. Needs the extra ``bbopd[quantize]``."""
    lr: Annotated[float, Field(gt=0)] = 2e-5
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: StepsOrFraction = 0.02
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decay_exempt: Literal["biases_and_norms", "biases"] = "biases_and_norms"
    clip: Annotated[float, Field(gt=0)] = 1.0
    on_policy_tokens: Annotated[int, Field(ge=0)] = 1_000_000
    """Trained response tokens of rollouts: the budget of the run."""
    cold_start_tokens: Annotated[int, Field(ge=0)] = 0
    """Labelled response tokens trained before the first rollout."""
    labelled_tokens: Annotated[int, Field(ge=0)] | None = None
    """Budget of a run without rollouts (on_policy_fraction 0, or sft), after the cold start."""
    total_steps: Positive | None = None
    """A second limit: whichever is reached first ends the run."""
    checkpoint_every: Positive = 100
    """Optimizer steps."""
    keep_checkpoints: Positive = 2
    seed: int = 0
    deterministic: bool = True


def resolve_steps(value: int | float, planned_steps: int) -> int:
    """Steps meant by ``value``: an int as it is, a float as a share of ``planned_steps`` (1.0 is the whole run)."""
    return value if isinstance(value, int) else round(value * planned_steps)
