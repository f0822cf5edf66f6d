"""Options of training: the optimizer and its schedule, batches, budgets, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from bbopd.config_base import Fraction, Positive, Section, StepsOrFraction


class ParallelConfig(Section):
    """How the student is spread over the processes that ``torchrun`` starts; a run of one process does not read it."""

    replicas: Positive = 1
    """Groups of ranks that each hold the student once, split within the group (HSDP); 1 splits it over all ranks."""
    gather: Literal["float32", "bfloat16"] = "float32"
    """What a layer's weights are gathered as before they are used. ``bfloat16`` halves the traffic and what autograd holds of weights
    between the passes; the residual stream is then in bfloat16 too. Masters, gradients and their sums are float32 in any case."""
    head: Literal["gathered", "split"] = "gathered"
    """How the output head reaches the loss: whole on every rank, for its own tokens; or each rank's rows of the vocabulary, for the tokens
    of all (`linear_distill` with ``group``), so that no rank ever holds the head, or its gradient, as a whole."""
    cpu_offload: bool = False
    """Keep weights, gradients and optimizer state in the host's memory, and the update there; a GPU then holds a few layers at a time."""
    whole_on: Literal["device", "cpu"] = "device"
    """Where rank 0 keeps the whole student in float32, which writes for the hf engine and is evaluated; it takes no part in training."""
    timeout: Positive = 600
    """Seconds that a rank waits for another within an update or a checkpoint before it gives the run up."""

    @model_validator(mode="after")
    def _head_can_be_split(self) -> ParallelConfig:
        for name, value in (("replicas", self.replicas > 1), ("cpu_offload", self.cpu_offload)):
            if self.head == "split" and value:
                raise ValueError(f"head split goes over all ranks, on their devices: leave {name} out, or set head=gathered")
        return self


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
    """The learning rate once the warm-up is over."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """What becomes of it after that: it stays, or falls to 0 at the end in a line or along a cosine."""
    warmup: StepsOrFraction = 0.02
    """Steps, or share of the run, over which it rises from 0."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """Of AdamW: how much of the mean gradient, and of its mean square, stays at each step."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Of AdamW: added to the root of the mean square."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of AdamW."""
    decay_exempt: Literal["biases_and_norms", "biases"] = "biases_and_norms"
    """What does not decay."""
    clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient; a larger one is scaled down to it."""
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
    """The newest ones that stay."""
    checkpoint_store: str | None = None
    """Where every checkpoint is copied to as well, by fsspec (``s3://bucket/run``, ``gs://``, ``file://``), one address a run. A run whose
    folder has no checkpoint goes on from there. Credentials come from the environment."""
    on_nonfinite: Literal["stop", "skip", "roll_back"] = "stop"
    """What follows an update whose loss or gradient is NaN or infinite, which is never applied. ``skip`` goes on without its sequences,
    ``roll_back`` from the last checkpoint with other prompts."""
    on_spike: Literal["none", "skip", "roll_back", "stop"] = "none"
    """What follows an update whose loss or gradient norm is far above those before; ``none`` applies it and does not look."""
    spike_threshold: Annotated[float, Field(gt=0)] = 10.0
    """How far is far: the median of the window and so many of its standard deviations, as the median absolute deviation tells them."""
    spike_window: Annotated[int, Field(ge=8)] = 64
    """Updates that were applied before, of the same phase; nothing is a spike before half of them are there."""
    bad_updates_in_a_row: Positive = 3
    """So many may be skipped or rolled back, with none between that got further than the one before; the next one stops the run."""
    seed: int = 0
    """Of the order of the data and of sampling."""
    deterministic: bool = True
    """The same run gives the same weights, to the last bit, on the same machine."""
    parallel: ParallelConfig = ParallelConfig()
    """How several processes share the work."""

    @model_validator(mode="after")
    def _store_has_no_secrets(self) -> TrainConfig:
        scheme, found, rest = (self.checkpoint_store or "file://").partition("://")
        if not (scheme and found) or "@" in rest or "?" in rest:
            raise ValueError(
                f"checkpoint_store is an address as s3://bucket/run, with nothing secret in it; this begins with {scheme}: its library has "
                "credentials from the environment (AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, FSSPEC_S3_KEY and the like)"
            )
        return self

    @property
    def rolls_back(self) -> bool:
        return "roll_back" in (self.on_nonfinite, self.on_spike)


def resolve_steps(value: int | float, planned_steps: int) -> int:
    """Steps meant by ``value``: an int as it is, a float as a share of ``planned_steps`` (1.0 is the whole run)."""
    return value if isinstance(value, int) else round(value * planned_steps)
