"""The options of a teacher: one that is hosted, one that is asked, its cost and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from bbopd.config_base import Fraction, Options, Positive, Section, known_in
from bbopd.config_grading import GradingConfig
from bbopd.plugins import PluginUse
from bbopd.types import Level

OWN_TEACHER = "own"
"""The name of the teacher of the section ``teacher``, beside those of ``teachers``."""

_API_SCHEMES = ("openai://", "https://")


class ServerTlsConfig(Section):
    """The certificate that a server shows, and whose certificates it wants to see. PEM files."""

    certificate: str
    """The server's certificate, with the chain up to its authority."""
    key: str
    """Its private key, without a password."""
    client_ca: str | None = None
    """Clients must show a certificate signed by this authority (mTLS)."""


class ClientTlsConfig(Section):
    """TLS towards a teacher; ``{}`` will do where its certificate is signed by a public authority. PEM files."""

    ca: str | None = None
    """The authority that signed the teacher's certificate; None trusts the public ones."""
    certificate: str | None = None
    """The client's own certificate, for a teacher that wants one (mTLS)."""
    key: str | None = None
    """Its private key, without a password."""
    server_name: str | None = None
    """The name in the teacher's certificate, where it is not the host of the target (a tunnel, an IP address)."""

    @model_validator(mode="after")
    def _both_or_neither(self) -> ClientTlsConfig:
        if (self.certificate is None) != (self.key is None):
            raise ValueError("certificate and key belong together: give both, or neither")
        return self


class ServeConfig(Section):
    """A teacher that this library hosts: the file of ``bbopd serve``, or ``teacher.serve`` to start one beside a run."""

    model: str
    """Hub id, folder or GGUF file."""
    engine: Literal["hf", "vllm"] = "hf"
    """``hf``: transformers, every level. ``vllm``: top-k, sampled and text, at temperature 1, the tail derived as 1 minus the sum."""
    gpu_memory: Annotated[float, Field(gt=0, lt=1)] = 0.9
    """Share of the GPU's memory that vllm may count on."""
    host: str = "127.0.0.1"
    """The address to listen on. Any but loopback needs tls and a token."""
    port: Annotated[int, Field(ge=0, le=65535)] = 7070
    """0 takes a free port."""
    tls: ServerTlsConfig | None = None
    """Needed, with a token, on every address but loopback."""
    token_file: str | None = None
    """Holds the tokens that let a client in, one a line; each is a client of its own where limits and turns are counted."""
    token_env: str | None = None
    """The same from an environment variable, by its name."""
    revision: str | None = None
    """A commit, tag or branch on the hub; None: the main one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What it computes in; ``auto``: bfloat16 where the hardware multiplies it, else float32."""
    device: str = "auto"
    """``cpu``, ``cuda`` or ``cuda:1``; ``auto`` takes a GPU where there is one."""
    levels: tuple[Level, ...] = ("full", "candidates", "topk", "sampled", "text")
    """What it tells (docs/objective.md): leave out what nobody should see."""
    max_top_k: Positive = 1024
    """Ids a token that a client may ask for."""
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
    """Load code that the model's files name. It runs with all your rights."""


class CacheConfig(Section):
    """Answers of the teacher that are kept, across runs too."""

    path: str
    """One file; runs on this machine may share it."""
    max_bytes: Positive | None = None
    """Size beyond which it does not grow; None: the disk's."""
    on_full: Literal["continue", "stop"] = "continue"
    """Where an answer cannot be kept: go on without keeping, after a warning, or stop."""


class ApiConfig(Section):
    """How an OpenAI-compatible endpoint is asked."""

    scoring: Literal["auto", "prompt_logprobs", "sglang", "echo", "none"] = "auto"
    """How it scores given tokens: vLLM's ``prompt_logprobs``, SGLang's ``/generate``, ``echo`` with ``logprobs``; ``auto`` tries them."""
    writing: Literal["auto", "completions", "chat"] = "auto"
    """How it writes: from token ids, or from messages; ``auto`` gives ids to an endpoint that scores by ids, messages to others."""
    requests_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Requests that may be sent in a minute; None: any number."""
    tokens_per_minute: Annotated[float, Field(gt=0)] | None = None
    """Prompt and answer together, the answer counted as long as it may be."""
    max_sequence_tokens: Positive | None = None
    """Prompt and answer together; None takes what the endpoint says of itself."""


class PricesConfig(Section):
    """What a teacher costs, for a million tokens."""

    prompt: Annotated[float, Field(ge=0)] = 0.0
    """Of tokens that are sent."""
    answer: Annotated[float, Field(ge=0)] = 0.0
    """Of tokens that come back."""
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")] = "USD"
    """Three letters; no rate between currencies is known here."""


class BudgetConfig(Section):
    """How much a teacher may cost; the run stops with a checkpoint before it would cost more."""

    limit: Annotated[float, Field(gt=0)]
    """In the currency of the prices. Raise it, and the same command goes on."""
    path: str | None = None
    """The file that keeps the sum; runs that name the same one share it. None: ``spending.db`` in the run's folder."""


class AnswersConfig(Section):
    """How a teacher writes its own answers, or grades; a prompt is learned with one, the same whenever it comes again."""

    max_new_tokens: Positive = 256
    """Of the teacher's tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """At which the teacher samples."""
    top_p: Annotated[float, Field(gt=0, le=1.0)] = 1.0
    """It samples from the fewest best tokens that hold this share of the probability; 1 leaves none out."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """1 is greedy."""
    samples: Positive = 1
    """Answers to each prompt, of which the best by ``best_by`` is kept (rejection sampling)."""
    best_by: Annotated[str, Field(pattern=r"^(student|teacher|grade|.+:.+)$")] | None = None
    """What is best: the mean logprob of a token to the ``student`` or to the ``teacher``; the ``grade`` that the teacher gives by
    ``teacher.grading``; or a score of your own, ``module:function`` or ``path.py:function``, of (prompt, text): a number, or None."""
    min_score: float | None = None
    """A prompt whose best answer has less is rejected, with the reason ``low_score``."""

    @model_validator(mode="after")
    def _has_a_measure(self) -> AnswersConfig:
        if (self.samples > 1 or self.min_score is not None) and self.best_by is None:
            raise ValueError(f"samples {self.samples} and min_score {self.min_score} need best_by, what answers are compared by")
        if self.samples > 1 and self.top_k == 1:
            raise ValueError(f"samples {self.samples} with top_k 1 would be the same answer each time: set top_k to 0, or samples to 1")
        return self


class SelfConfig(Section):
    """The student as its own teacher, which reads more than the student does (on-policy self-distillation)."""

    context: str
    """What it reads: a template with ``{prompt}``, in which ``{reference}`` is the known answer. Of messages it takes the place of the
    last one of the user."""
    weights: Literal["student", "ema"] = "student"
    """``student``: as they are when it is asked. ``ema``: an exponential moving average of them, held in float32 beside them."""
    ema_decay: Fraction = 0.999
    """What stays of the average at each optimizer step; 1 keeps the weights that the run began with."""

    @model_validator(mode="after")
    def _holds_the_prompt(self) -> SelfConfig:
        if self.context.count("{prompt}") != 1:
            raise ValueError(f"context {self.context!r} needs one {{prompt}}, where it reads what the student does")
        return self


class TeacherConfig(Section):
    """The model that is asked."""

    target: str | tuple[str, ...] | None = None
    """``grpc://host:port``, or a list of such: replicas of one teacher, among which the work is spread. Or an OpenAI-compatible endpoint:
    ``openai://host:port/v1`` on this machine, ``https://host/v1`` anywhere."""
    model: str | None = None
    """Its name at an OpenAI-compatible endpoint; None: the only one there."""
    tokenizer: str | None = None
    """Hub id or folder of the teacher's tokenizer: for an endpoint that cannot show its own, and for ``objective.name: aligned``, where
    None is that of ``serve.model``."""
    api: ApiConfig | None = None
    """For an OpenAI-compatible endpoint."""
    prices: PricesConfig | None = None
    """None: what the teacher says of itself."""
    budget: BudgetConfig | None = None
    """What may be spent; None: no limit."""
    serve: ServeConfig | None = None
    """Start one beside the run, as a process of its own, on loopback."""
    self: SelfConfig | None = None
    """No other model: the student's own weights."""
    plugin: Annotated[str, known_in("teachers")] | None = None
    """A teacher of another package, by the name that this registers."""
    options: Options = Field(default_factory=dict)
    """Of ``plugin``: what it knows, as it documents it."""
    tls: ClientTlsConfig | None = None
    """Needed for every target but loopback."""
    token_file: str | None = None
    """Holds the token that the teacher wants."""
    token_env: str | None = None
    """The environment variable that holds it."""
    signal: Literal["full", "candidates", "topk", "sampled", "text", "none"] = "full"
    """``full``: all logits. ``topk``: the teacher's own best ids. ``candidates``: the student's best ids, with the token itself.
    ``sampled``: the logprob of the token that the student sampled, for ``objective.name: policy_gradient``. ``text``: the teacher's own
    written answers, for ``objective.name: seqkd`` or ``gad``; no vocabulary in common is needed."""
    writes_labels: bool = False
    """Labelled sequences are answers that the teacher writes, scored like any other, in place of the data's own continuations."""
    answers: AnswersConfig = AnswersConfig()
    """How the teacher writes them, and those of ``signal: text``."""
    grading: GradingConfig | None = None
    """How the teacher grades the student's answers, for ``objective.name: verbal``."""
    topk: Annotated[int, Field(ge=1, le=1024)] = 64
    """Ids a token, where ``signal`` is topk or candidates. Giving it alone selects ``signal: topk``."""
    timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds without any answer, from any replica, before the teacher counts as gone."""
    start_timeout: Annotated[float, Field(gt=0)] = 300.0
    """Seconds a teacher may take to load and answer for the first time."""
    inflight_tokens: Positive = 8192
    """Tokens of rollouts sent to one replica and not yet answered."""
    cache: CacheConfig | None = None
    """Where answers are kept; None: nowhere, unless they are paid for."""
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
        if self.signal != "none" and [self.target, self.serve, self.self, self.plugin].count(None) != 3:
            raise ValueError(
                "give exactly one of target (a running teacher), serve (start one beside the run), self (the student's own weights) and "
                "plugin (a teacher of another package)"
            )
        if self.plugin is None and self.options:
            raise ValueError("options belong to a teacher that is a plug-in: name it in plugin, or leave them out")
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
        if not self.is_api and (self.model or self.api):
            raise ValueError("model and api belong to an OpenAI-compatible target (openai://… or https://…)")
        if self.serve is not None and (self.tls or self.token_file or self.token_env):
            raise ValueError("tls and tokens belong to target: a teacher that is started beside the run answers on loopback alone")
        if self.plugin is not None and (self.tls or self.token_file or self.token_env):
            raise ValueError("tls and tokens belong to target: how a plug-in reaches its teacher is among its own options")
        return self

    @model_validator(mode="after")
    def _self_is_no_service(self) -> TeacherConfig:
        if self.self is None:
            return self
        if self.signal == "text":
            raise ValueError("signal text with self: a student's own texts teach it nothing; take full, candidates, topk or sampled")
        if self.writes_labels:
            raise ValueError("writes_labels with self: a student that writes its own labels learns nothing from them; leave it out")
        if self.cache is not None:
            raise ValueError("cache with self: its weights change at every step, and with them its answers; leave it out")
        given = [name for name in ("tokenizer", "prices", "budget", "grading", "tls", "token_file", "token_env") if getattr(self, name)]
        if given:
            raise ValueError(f"{given[0]} is for a teacher elsewhere, and self is none: leave it out")
        return self

    @property
    def plugin_use(self) -> PluginUse | None:
        """The teacher, where another package brings it."""
        return None if self.plugin is None else PluginUse("teachers", self.plugin, self.options, "teacher.options")

    @property
    def is_api(self) -> bool:
        """Whether the target is an OpenAI-compatible endpoint."""
        return any(target.startswith(_API_SCHEMES) for target in self.targets)

    @property
    def targets(self) -> tuple[str, ...]:
        """The addresses of ``target``, one or more; none where it is not given."""
        return (self.target,) if isinstance(self.target, str) else self.target or ()
