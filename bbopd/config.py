"""Every option of a run, as one model. Imports no torch, so that the command line stays quick.

What a run needs is checked here, all of it, before anything is loaded or spent; `config_file` reads it from YAML.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from bbopd.types import Divergence, Level

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(gt=0)]
_API_SCHEMES = ("openai://", "https://")
Similarity = Annotated[float, Field(ge=0.3, le=1.0)]  # Jaccard index
StepsOrFraction = Annotated[int, Field(ge=0)] | Fraction  # an int is a number of steps, a float a share of the run


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class InitConfig(_Section):
    """How the student starts."""

    keep_layers: tuple[int, ...] | None = None
    """Layers of the model to keep, in order; the others are dropped. None keeps all."""

    @field_validator("keep_layers", mode="before")
    @classmethod
    def _expand_ranges(cls, value: Any) -> Any:
        """Accept ``[0, 1, 2]`` or ``"0-11,22-29"``."""
        if not isinstance(value, str):
            return value
        layers: list[int] = []
        for part in value.split(","):
            first, _, last = part.strip().partition("-")
            try:
                layers.extend(range(int(first), int(last or first) + 1))
            except ValueError:
                raise ValueError(f"{part.strip()!r} is neither a layer nor a range such as 0-11") from None
        return layers

    @field_validator("keep_layers")
    @classmethod
    def _check_order(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if value is not None and (not value or list(value) != sorted(set(value)) or value[0] < 0):
            raise ValueError("layers must be given in rising order, each once, at least one")
        return value


class StudentConfig(_Section):
    """The model that learns."""

    model: str
    """Hub id, folder, or a GGUF file."""
    init: InitConfig = InitConfig()
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; master weights are always float32. ``auto``: bfloat16 where the hardware multiplies it, else float32."""
    device: str = "auto"
    attention: Literal["auto", "sdpa", "flash_attention_2"] = "auto"
    activation_checkpointing: bool = False
    trust_remote_code: bool = False


class ServerTlsConfig(_Section):
    """The certificate that a server shows, and whose certificates it wants to see. PEM files."""

    certificate: str
    """The server's certificate, with the chain up to its authority."""
    key: str
    """Its private key, without a password."""
    client_ca: str | None = None
    """Clients must show a certificate signed by this authority (mTLS)."""


class ClientTlsConfig(_Section):
    """TLS towards a teacher; ``{}`` will do where its certificate is signed by a public authority. PEM files."""

    ca: str | None = None
    """The authority that signed the teacher's certificate; None trusts the public ones."""
    certificate: str | None = None
    """The client's own certificate, for a teacher that wants one (mTLS)."""
    key: str | None = None
    server_name: str | None = None
    """The name in the teacher's certificate, where it is not the host of the target (a tunnel, an IP address)."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> ClientTlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both, or neither")
        return self


class ServeConfig(_Section):
    """A teacher that this library hosts: the file of ``bbopd serve``, or ``teacher.serve`` to start one beside a run."""

    model: str
    engine: Literal["hf", "vllm"] = "hf"
    """``hf``: transformers, every level. ``vllm``: top-k, sampled and text, at temperature 1, the tail derived as 1 minus the sum."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the GPU's memory that vllm may count on."""
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 7070
    """0 takes a free port."""
    tls: ServerTlsConfig | None = None
    """Needed, with a token, on every address but loopback."""
    token_file: str | None = None
    """Holds the tokens that let a client in, one a line; each is a client of its own where limits and turns are counted."""
    token_env: str | None = None
    """The same from an environment variable, by its name."""
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"
    levels: tuple[Level, ...] = ("full", "candidates", "topk", "sampled", "text")
    max_top_k: Positive = 1024
    max_sequence_tokens: Positive | None = None
    """Prompt and answer together; None takes the model's own limit."""
    batch_tokens: Positive = 2048
    """Tokens of one forward pass."""
    max_inflight_bytes: Positive = 256 * 2**20
    """Answers made but not yet taken by one client."""
    max_client_tokens: Positive = 524_288
    """Tokens of sequences that one client may have in flight, tokens to write included; half of it is announced to clients."""
    max_client_streams: Positive = 8
    """Scoring streams that one client may have open."""
    max_client_calls: Positive = 64
    """Calls for written answers that one client may have open."""
    max_client_requests_per_second: Annotated[float, Field(gt=0)] | None = None
    """Calls, rollouts and prompts of one client; a second's worth may come at once. None: any number."""
    replay_bytes: Annotated[int, Field(ge=0)] = 256 * 2**20
    """Answers kept for clients that ask again under the same replay_id; 0 keeps none."""
    metrics_port: Annotated[int, Field(ge=1, le=65535)] | None = None
    """Prometheus metrics over HTTP; None: none."""
    metrics_host: str = "127.0.0.1"
    """Metrics are plain HTTP without a token: they hold counts and times, no tokens, texts or addresses."""
    log: Literal["text", "json"] = "text"
    """``json``: one object a line for every call, item and batch, without ids of tokens, texts or secrets."""
    drain_seconds: Annotated[float, Field(ge=0)] = 10.0
    """On SIGTERM, how long answers under way may take."""
    trust_remote_code: bool = False


class CacheConfig(_Section):
    """Answers of the teacher that are kept, across runs too."""

    path: str
    """One file; runs on this machine may share it."""
    max_bytes: Positive | None = None
    """Size beyond which it does not grow; None: the disk's."""
    on_full: Literal["continue", "stop"] = "continue"
    """Where an answer cannot be kept: go on without keeping, after a warning, or stop."""


class ApiConfig(_Section):
    """How an OpenAI-compatible endpoint is asked."""

    scoring: Literal["auto", "prompt_logprobs", "sglang", "echo", "none"] = "auto"
    """How it scores given tokens: vLLM's ``prompt_logprobs``, SGLang's ``/generate``, ``echo`` with ``logprobs``; ``auto`` tries them."""
    writing: Literal["auto", "completions", "chat"] = "auto"
    """How it writes: from token ids, or from messages; ``auto`` gives ids to an endpoint that scores by ids, messages to others."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Prompt and answer together, the answer counted as long as it may be."""
    max_sequence_tokens: Positive | None = None
    """Prompt and answer together; None takes what the endpoint says of itself."""


class PricesConfig(_Section):
    """What a teacher costs, for a million tokens."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    answer: Annotated[float, Field(ge=0)] = 0.0
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"


class BudgetConfig(_Section):
    """How much a teacher may cost; the run stops with a checkpoint before it would cost more."""

    limit: Annotated[float, Field(gt=0)]
    """In the currency of the prices. Raise it, and the same command goes on."""
    path: str | None = None
    """The file that keeps the sum; runs that name the same one share it. None: ``spending.db`` in the run's folder."""


class AnswersConfig(_Section):
    """How a teacher writes its own answers; each prompt has one, the same whenever it comes again."""

    max_new_tokens: Positive = 256
    """Of the teacher's tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    """1 is greedy."""


class TeacherConfig(_Section):
    """The model that is asked."""

    target: str | tuple[str, ...] | None = None
    """``grpc://host:port``, or a list of such: replicas of one teacher, among which the work is spread. Or an OpenAI-compatible endpoint:
    ``openai://host:port/v1`` on this machine, ``https://host/v1`` anywhere."""
    model: str | None = None
    """Its name at an OpenAI-compatible endpoint; None: the only one there."""
    tokenizer: str | None = None
    """Hub id or folder of that model's tokenizer, where the endpoint cannot show its own."""
    api: ApiConfig | None = None
    """For an OpenAI-compatible endpoint."""
    prices: PricesConfig | None = None
    """None: what the teacher says of itself."""
    budget: BudgetConfig | None = None
    serve: ServeConfig | None = None
    """Start one beside the run, as a process of its own, on loopback."""
    tls: ClientTlsConfig | None = None
    """Needed for every target but loopback."""
    token_file: str | None = None
    """Holds the token that the teacher wants."""
    token_env: str | None = None
    """The environment variable that holds it."""
    signal: Literal["full", "topk", "text", "none"] = "full"
    """``text``: the teacher's own written answers, for ``objective.name: seqkd``; no vocabulary in common is needed."""
    answers: AnswersConfig = AnswersConfig()
    """How the teacher writes them."""
    topk: Annotated[int, Field(ge=1, le=1024)] = 64
    """Ids a token, where ``signal`` is topk. Giving it alone selects ``signal: topk``."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without any answer, from any replica, before the teacher counts as gone."""
    start_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds a teacher may take to load and answer for the first time."""
    inflight_tokens: Positive = 8192
    """Tokens of rollouts sent to one replica and not yet answered."""
    cache: CacheConfig | None = None
    max_replica_difference: Fraction = 0.05
    """Share of the probability of a token by which replicas may differ (total variation), measured at the start of a run."""

    @model_validator(mode="before")
    @classmethod
    def _topk_selects_signal(cls, data: Any) -> Any:
        if isinstance(data, Mapping) and "topk" in data and "signal" not in data:
            return {**data, "signal": "topk"}
        return data

    @model_validator(mode="after")
    def _one_way_in(self) -> TeacherConfig:
        if self.signal != "none" and (self.target is None) == (self.serve is None):
            raise ValueError("give exactly one of target (a running teacher) and serve (start one beside the run)")
        if self.target is not None and (not self.targets or len(set(self.targets)) != len(self.targets)):
            raise ValueError(f"{list(self.targets)} must be one or more addresses, each once")
        for target in self.targets:
            if not target.startswith(("grpc://", *_API_SCHEMES)):
                raise ValueError(
                    f"{target!r} is not an address this version speaks: use grpc://host:port, or, for an OpenAI-compatible endpoint, "
                    "openai://localhost:8000/v1 on this machine and https://host/v1 anywhere"
                )
            if target.startswith(_API_SCHEMES) and len(self.targets) > 1:
                raise ValueError(f"{target!r} cannot be one of several targets: put one address that balances before them")
        if not self.is_api and (self.model or self.tokenizer or self.api):
            raise ValueError("model, tokenizer and api belong to an OpenAI-compatible target (openai://… or https://…)")
        if self.serve is not None and (self.tls or self.token_file or self.token_env):
            raise ValueError("tls and tokens belong to target: a teacher that is started beside the run answers on loopback alone")
        return self

    @property
    def is_api(self) -> bool:
        """Whether the target is an OpenAI-compatible endpoint."""
        return any(target.startswith(_API_SCHEMES) for target in self.targets)

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses of ``target``, one or more; none where it is not given."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()


class EngineAgreementConfig(_Section):
    """Whether an engine with weights of its own computes what the trainer does: checked on the first rollouts after every push."""

    tokens: Annotated[int, Field(ge=0)] = 256
    """Sampled tokens that the trainer scores too, about; 0 checks nothing. Needs top_p 1 and top_k 0."""
    limit: Annotated[float, Field(gt=0)] | None = None
    """Largest mean difference of a token's logprob, in nats; None: 0.001 where the student computes in float32, 0.1 in bfloat16."""


class RolloutsConfig(_Section):
    """How the student writes."""

    engine: Literal["hf", "vllm"] = "hf"
    """``hf``: transformers, on the trainer's own weights. ``vllm``: a process beside the run, which gets new weights after every update."""
    timeout: Annotated[float, Field(gt=0)] = 600.0
    """Seconds without a sign of life, loading included, before vllm counts as dead."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the GPU's memory that vllm takes for weights and KV cache; the trainer has the rest."""
    agreement: EngineAgreementConfig = EngineAgreementConfig()
    per_update: Positive = 16
    """Sequences of one update cycle, rollouts and labelled ones together."""
    samples_per_prompt: Positive = 2
    max_new_tokens: Positive = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    on_policy_fraction: Fraction = 0.5
    """Share of a cycle's sequences that the student writes (GKD's lambda)."""
    max_staleness: Annotated[int, Field(ge=0, le=1)] = 1
    """Update cycles that may begin between a push of weights and the training on what they wrote.

    0: cycles take turns, each in the order of drawing, so that a resumed run repeats an uninterrupted one (with the hf engine).
    1: an engine with weights of its own (vllm) writes the next cycle while this one is trained; hf still takes turns, but each rollout
    goes to the teacher as it ends.
    """


class ObjectiveConfig(_Section):
    """What is minimised: ``ce_weight * CE + kd_weight * T^2 * KD``."""

    name: Divergence | Literal["sft", "seqkd"] = "forward_kl"
    """A divergence, or cross-entropy alone: ``sft`` on labelled text, without a teacher; ``seqkd`` on answers that the teacher writes."""
    alpha: Fraction | None = None
    """Short for ce_weight = alpha, kd_weight = 1 - alpha. 0.5 where nothing is given."""
    ce_weight: Annotated[float, Field(ge=0)] | None = None
    kd_weight: Annotated[float, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(gt=0)] = 2.0
    t2_scaling: bool = True
    beta: Fraction = 0.5
    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1
    ramp: StepsOrFraction = 0.1
    """Steps, or share of the run, over which the ramp rises."""
    ramp_kind: Literal["kd_weight", "alpha"] = "kd_weight"
    """``kd_weight`` rises from 0 while ce_weight keeps its own; ``alpha`` is the literal reading: alpha rises from 0."""

    @model_validator(mode="after")
    def _weights_given_once(self) -> ObjectiveConfig:
        if self.alpha is not None and (self.ce_weight is not None or self.kd_weight is not None):
            raise ValueError("give alpha, or ce_weight and kd_weight, not both")
        if self.ramp_kind == "alpha" and (self.ce_weight is not None or self.kd_weight is not None):
            raise ValueError("ramp_kind alpha needs alpha, not ce_weight and kd_weight")
        return self

    @property
    def is_cross_entropy(self) -> bool:
        """Whether there is no signal on tokens, hence no KD and no rollouts."""
        return self.name in ("sft", "seqkd")

    @property
    def weights(self) -> tuple[float, float]:
        """The targets (ce_weight, kd_weight), before any ramp."""
        if self.is_cross_entropy:
            return (1.0, 0.0)
        if self.ce_weight is not None or self.kd_weight is not None:
            return (self.ce_weight or 0.0, self.kd_weight or 0.0)
        alpha = 0.5 if self.alpha is None else self.alpha
        return (alpha, 1.0 - alpha)


class TrainConfig(_Section):
    """How the student is updated, and for how long."""

    batch_tokens: Positive = 2048
    """Response tokens of one optimizer step, about."""
    micro_batch_tokens: Positive = 4096
    """Packed tokens, prompts included, of one forward and backward pass."""
    max_seq_len: Positive = 1024
    """Prompt and response together."""
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


class FiltersConfig(_Section):
    """Which rollouts are not worth a teacher's time. Every rejected one is kept in rejected.jsonl with its reason."""

    min_tokens: Annotated[int, Field(ge=0)] = 4
    max_tokens: Positive | None = None
    reject_truncated: bool = False
    max_repetition: Fraction = 0.6
    """Largest share of repeated n-grams in one answer."""
    repetition_ngram: Annotated[int, Field(ge=2)] = 4
    reject_duplicates: bool = True
    """Equal answers to one prompt in one update cycle."""
    reject_no_eos: bool = False
    """Answers that do not end with a token that ends a text, whatever stopped them."""
    charset: tuple[str, ...] = ()
    """Scripts of Unicode that answers are written in (Latin, Cyrillic, ...); ``any``: all but garbled characters; ``ascii`` alone."""
    max_foreign: Fraction = 0.05
    """Largest share of characters outside ``charset``."""
    languages: tuple[str, ...] = ()
    """ISO 639 codes of the languages that answers are written in; needs bbopd[data]."""
    min_language: Fraction = 0.1
    """Smallest probability that an answer is in one of ``languages``."""
    near_duplicates: Similarity | None = None
    """Similarity to an accepted answer of the run from which on one is turned away; needs bbopd[data]."""
    near_duplicates_kept: Positive = 4096
    """Accepted answers that are remembered for it, the last ones."""
    hooks: tuple[str, ...] = ()
    """Functions of your own, as ``module:function`` or ``path.py:function``: trusted code, run inside the run."""
    min_kept: Fraction = 0.05
    """Share of the last ``kept_window`` rollouts that must pass, or the run stops."""
    kept_window: Positive = 200
    quarantine_bytes: Positive = 64 * 2**20
    """Largest size of rejected.jsonl."""


class PromptSource(_Section):
    """One source of prompts: exactly one of ``demo``, ``jsonl``, ``parquet``, ``text``, ``dataset``."""

    demo: bool = False
    """The text that Python itself carries (pydoc topics) and the library's own chat prompts."""
    jsonl: str | None = None
    """Lines with ``prompt``, ``messages`` or ``conversations``, and optionally ``response`` or ``completion``."""
    parquet: str | None = None
    """A Parquet file, or a folder of them, with columns like those of ``dataset``."""
    text: str | None = None
    """A plain text file, or a folder of them; documents are cut into prefixes and continuations."""
    dataset: str | None = None
    """A name for datasets.load_dataset, streamed."""
    subset: str | None = None
    split: str = "train"
    column: str | None = None
    """Column of rows that is read: a chat where it holds a list, else running text. None takes ``messages``, ``conversations``, ``prompt``
    or ``text``, whichever is there."""
    limit: Positive | None = None
    """Documents to take; of a ``dataset``, 20,000 where it is not given."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """How often its prompts are drawn, beside the weights of the other sources. None: as often as it has prompts."""
    bad_rows: Literal["error", "skip"] = "error"
    """What happens to a row without a usable question or text; those skipped are counted."""

    @model_validator(mode="after")
    def _exactly_one(self) -> PromptSource:
        given = [name for name in ("demo", "jsonl", "parquet", "text", "dataset") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of demo, jsonl, parquet, text, dataset; got {given or 'none'}")
        return self

    @property
    def name(self) -> str:
        return str(self.jsonl or self.parquet or self.text or self.dataset or "demo")


class DataConfig(_Section):
    prompts: tuple[PromptSource, ...] = (PromptSource(demo=True),)
    prompt_tokens: Positive = 64
    """Tokens of a document that become the prompt."""
    response_tokens: Positive = 192
    """Tokens of a document that become its true continuation."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of documents set aside for evaluation."""
    long_prompts: Literal["error", "skip", "truncate"] = "error"
    """What happens to a question that leaves no room for an answer; ``truncate`` takes its last tokens."""
    near_duplicates: Similarity | None = None
    """Similarity to an earlier document from which on one is left out; needs bbopd[data]."""
    rank: Annotated[int, Field(ge=0)] = 0
    """Which of ``world_size`` disjoint shares of the draws this run takes."""
    world_size: Positive = 1
    filters: FiltersConfig = FiltersConfig()

    @model_validator(mode="after")
    def _shares_fit(self) -> DataConfig:
        if self.rank >= self.world_size:
            raise ValueError(f"rank {self.rank} of world_size {self.world_size}: ranks count from 0 to {self.world_size - 1}")
        weighted = [source.name for source in self.prompts if source.weight is not None]
        if weighted and len(weighted) < len(self.prompts):
            raise ValueError(
                f"weight is given to {', '.join(weighted)} but not to every source: give it to all of data.prompts, or to none"
            )
        return self


class EvalConfig(_Section):
    every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between evaluations; 0 evaluates at the start, after the cold start and at the end."""
    sequences: Positive = 16
    """Held-out sequences."""
    rollouts: Positive = 16
    """Rollouts written to measure the KL on the student's own text."""
    max_new_tokens: Positive = 128


class RunConfig(_Section):
    """One run: ``bbopd distill run.yaml``."""

    student: StudentConfig
    teacher: TeacherConfig = TeacherConfig(signal="none")
    rollouts: RolloutsConfig = RolloutsConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    data: DataConfig = DataConfig()
    eval: EvalConfig = EvalConfig()
    output: str = "runs/latest"

    @model_validator(mode="after")
    def _pieces_fit(self) -> RunConfig:
        objective, train, rollouts = self.objective, self.train, self.rollouts
        if objective.name != "sft" and self.teacher.signal == "none":
            raise ValueError(f"objective {objective.name} needs a teacher: give teacher.target or teacher.serve")
        if (objective.name == "seqkd") != (self.teacher.signal == "text") and objective.name != "sft":
            raise ValueError(
                f"objective.name {objective.name} with teacher.signal {self.teacher.signal}: seqkd learns from what the teacher writes "
                "(text), the divergences from its signal on tokens (full, topk); set objective.name=seqkd with teacher.signal=text, or "
                "neither of them"
            )
        if self.teacher.signal == "topk" and objective.name != "sft" and objective.temperature != 1.0:
            raise ValueError(
                f"objective.temperature {objective.temperature} with teacher.topk: the top ids hold too little of the mass above "
                "temperature 1; set objective.temperature=1, or teacher.signal=full"
            )
        if self.writes_rollouts and objective.weights[1] == 0:
            raise ValueError("the KD weight is 0, so rollouts would teach nothing: lower objective.alpha, or take objective.name=sft")
        if self.writes_rollouts and train.on_policy_tokens == 0:
            raise ValueError("train.on_policy_tokens is 0: set a budget, or rollouts.on_policy_fraction=0 for a run without rollouts")
        if not self.writes_rollouts and train.labelled_tokens is None and train.total_steps is None:
            raise ValueError("a run without rollouts needs train.labelled_tokens or train.total_steps as its budget")
        if rollouts.max_new_tokens >= train.max_seq_len:
            raise ValueError(
                f"rollouts.max_new_tokens {rollouts.max_new_tokens} leaves no room for a prompt within train.max_seq_len "
                f"{train.max_seq_len}"
            )
        if self.writes_rollouts and self.rollouts_per_cycle < 1:
            raise ValueError(
                f"rollouts.per_update {rollouts.per_update} x on_policy_fraction {rollouts.on_policy_fraction} is no rollout at all"
            )
        has_ramp = objective.ramp > 0 and not objective.is_cross_entropy
        if has_ramp and rollouts.on_policy_fraction == 1.0 and train.cold_start_tokens == 0:
            raise ValueError(
                "objective.ramp without labelled tokens only rescales one loss, which AdamW cancels: set objective.ramp=0, "
                "or rollouts.on_policy_fraction below 1"
            )
        steps = self.planned_steps
        for key, value in (("objective.ramp", objective.ramp if has_ramp else 0), ("train.warmup", train.warmup)):
            if resolve_steps(value, steps) > steps:
                raise ValueError(
                    f"{key} is {value} steps, but the budgets allow about {steps} steps of {train.batch_tokens} tokens: "
                    "raise train.on_policy_tokens, or give it as a fraction of the run (0.1)"
                )
        return self

    @property
    def writes_rollouts(self) -> bool:
        return not self.objective.is_cross_entropy and self.rollouts.on_policy_fraction > 0

    @property
    def rollouts_per_cycle(self) -> int:
        return round(self.rollouts.per_update * self.rollouts.on_policy_fraction) if self.writes_rollouts else 0

    @property
    def planned_steps(self) -> int:
        """Optimizer steps that the budgets allow where every answer is as long as it may be; shorter answers make more of them."""
        train, rollouts = self.train, self.rollouts
        on_policy = self.rollouts_per_cycle * rollouts.max_new_tokens
        labelled = rollouts.per_update * (
            self.teacher.answers.max_new_tokens if self.objective.name == "seqkd" else self.data.response_tokens
        )
        steps = _cycles(train.cold_start_tokens, labelled) * self._steps_of(labelled)
        if self.writes_rollouts:
            mixed = on_policy + (rollouts.per_update - self.rollouts_per_cycle) * self.data.response_tokens
            steps += _cycles(train.on_policy_tokens, on_policy) * self._steps_of(mixed)
        elif train.labelled_tokens is not None:
            steps += _cycles(train.labelled_tokens, labelled) * self._steps_of(labelled)
        else:
            steps += train.total_steps or 0
        return max(1, min(steps, train.total_steps) if train.total_steps else steps)

    def _steps_of(self, cycle_tokens: int) -> int:
        return max(1, round(cycle_tokens / self.train.batch_tokens))


def _cycles(budget: int, cycle_tokens: int) -> int:
    return math.ceil(budget / max(1, cycle_tokens))


def resolve_steps(value: int | float, planned_steps: int) -> int:
    """Steps meant by ``value``: an int as it is, a float as a share of ``planned_steps`` (1.0 is the whole run)."""
    return value if isinstance(value, int) else round(value * planned_steps)
