"""How a student writes: the engine, where it runs, and how far it may disagree with the trainer."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from bbopd.config_base import Fraction, Options, Positive, Section, known_in
from bbopd.config_teacher import ClientTlsConfig, ServerTlsConfig
from bbopd.plugins import GROUPS, EngineName, PluginUse


class EngineAgreementConfig(Section):
    """Whether an engine with weights of its own computes what the trainer does: checked on the first rollouts after every push."""

    tokens: Annotated[int, Field(ge=0)] = 256
    """Sampled tokens that the trainer scores too, about; 0 checks nothing. Needs top_p 1 and top_k 0."""
    limit: Annotated[float, Field(gt=0)] | None = None
    """Largest mean difference of a token's logprob, in nats.

    None: 0.001 where the student computes in float32; in bfloat16 0.1, or twice what rounding alone makes of this student, if that is more.
    """


class RolloutsConfig(Section):
    """How the student writes."""

    engine: Annotated[EngineName | str, known_in("engines")] = "hf"
    """``hf``: transformers, on the trainer's own weights. ``vllm``: a process beside the run, which gets new weights after every update. Or
    the name of a plug-in, which gets them too."""
    options: Options = Field(default_factory=dict)
    """Of an engine that is a plug-in: what it knows, as it documents it."""
    target: str | None = None
    """``grpc://host:port`` of a `bbopd sample-server` whose vllm writes for this run; None starts one beside the run."""
    targets_file: str | None = None
    """Or a file of such addresses, one a line, in place of ``target``: all of them write, and it is read again as it changes."""
    tls: ClientTlsConfig | None = None
    """Needed, with a token, for a target on another machine."""
    token_file: str | None = None
    """A file that holds the token of the target."""
    token_env: str | None = None
    """Or the environment variable that does."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a sign of life, loading included, before vllm counts as dead."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the GPU's memory that vllm takes for weights and KV cache; the trainer has the rest."""
    sleep: bool = False
    """Whether vllm gives its memory on the GPU to the trainer while that trains; needs max_staleness 0 and an engine beside the run."""
    agreement: EngineAgreementConfig = EngineAgreementConfig()
    """Whether an engine with weights of its own computes what the trainer does."""
    per_update: Positive = 16
    """Sequences of one update cycle, rollouts and labelled ones together."""
    samples_per_prompt: Positive = 2
    """Answers that the student writes to one prompt."""
    max_new_tokens: Positive = 512
    """Tokens of one answer, at most."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """At which tokens are sampled; 1 is the student's own distribution."""
    top_p: Annotated[float, Field(gt=0, le=1.0)] = 1.0
    """Sample from the fewest best tokens that hold this share of the probability; 1 leaves none out."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample from so many best tokens; 0 leaves none out."""
    on_policy_fraction: Fraction | tuple[Fraction, Fraction] = 0.5
    """Share of a cycle's sequences that the student writes (GKD's lambda). Two numbers: from the first to the second, as the tokens of
    ``train.on_policy_tokens`` are trained; a cycle has one rollout or more."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 1
    """Update cycles that may begin between a push of weights and the training on what they wrote.

    0: cycles take turns, each in the order of drawing, so that a resumed run repeats an uninterrupted one (with the hf engine).
    1: an engine with weights of its own (vllm) writes the next cycle while this one is trained; hf still takes turns, but each rollout
    goes to the teacher as it ends.
    """

    @model_validator(mode="after")
    def _target_fits(self) -> RolloutsConfig:
        if self.target is not None and self.targets_file is not None:
            raise ValueError(f"target {self.target} and targets_file {self.targets_file} both say who writes: keep one")
        if self.is_elsewhere and self.engine != "vllm":
            where = self.target or self.targets_file
            raise ValueError(f"target {where} with engine {self.engine}: only vllm can write elsewhere; set engine: vllm")
        if not self.is_elsewhere and (self.tls or self.token_file or self.token_env):
            raise ValueError("tls and tokens belong to target: an engine beside the run answers this run alone")
        return self

    @model_validator(mode="after")
    def _options_belong_to_a_plugin(self) -> RolloutsConfig:
        if self.options and self.plugin_use is None:
            raise ValueError(f"options belong to an engine that is a plug-in, and {self.engine} is none: leave them out")
        return self

    @model_validator(mode="after")
    def _sleep_fits(self) -> RolloutsConfig:
        if self.sleep and (self.engine != "vllm" or self.is_elsewhere):
            where = f"target {self.target or self.targets_file}" if self.is_elsewhere else f"engine {self.engine}"
            raise ValueError(f"sleep with {where}: only a vllm beside the run has memory that the trainer could use; leave sleep out")
        if self.sleep and self.max_staleness:
            raise ValueError(
                f"sleep with max_staleness {self.max_staleness}: the engine writes while the trainer trains, and never sleeps; set "
                "max_staleness: 0, or leave sleep out"
            )
        return self

    @property
    def plugin_use(self) -> PluginUse | None:
        """The engine, where another package brings it."""
        if self.engine in GROUPS["engines"].built_in:
            return None
        return PluginUse("engines", self.engine, self.options, "rollouts.options")

    @property
    def is_elsewhere(self) -> bool:
        """Whether the engine is that of a server, or several, and not beside the run."""
        return self.target is not None or self.targets_file is not None


class SampleServerConfig(Section):
    """An engine for runs on other machines: the file of ``bbopd sample-server``."""

    host: str = "127.0.0.1"
    """Any but loopback needs tls and a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7071
    """0 takes a free port."""
    tls: ServerTlsConfig | None = None
    """Needed, with a token, on every address but loopback."""
    token_file: str | None = None
    """Tokens, one a line, any of which lets a run in."""
    token_env: str | None = None
    """The same from an environment variable, by its name."""
    device: str = "auto"
    """Where vllm runs: ``cpu``, ``cuda``; ``auto`` takes a GPU where there is one."""
    trust_remote_code: bool = False
    """Whether a run may have code loaded that its student's files name."""
