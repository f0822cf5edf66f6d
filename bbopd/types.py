"""The nouns that travel through bbopd, as frozen dataclasses, and the protocols at its seams; those of the two ops are in `op_types`.

Nothing here imports torch. Shape suffixes: ``N`` tokens, ``V`` vocabulary, ``K`` top-k, ``M`` candidates,
``L`` response tokens of one rollout, ``P`` packed tokens of a batch, ``S`` sequences.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from bbopd.op_types import (
    CandidateTeacher,
    DistillLoss,
    FullTeacher,
    OpTeacher,
    SampledTeacher,
    SpanTeacher,
    TokenLogprobs,
    TopKTeacher,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

__all__ = [
    "ALIGNED_ID",
    "ALIGNED_RANK",
    "ALIGNED_SPAN",
    "DIVERGENCES",
    "IGNORE_INDEX",
    "LEVELS",
    "CandidateTeacher",
    "Completion",
    "DistillBatch",
    "DistillLoss",
    "Divergence",
    "FinishReason",
    "FullTeacher",
    "Group",
    "Judge",
    "Level",
    "Offer",
    "OpTeacher",
    "Origin",
    "Prompt",
    "Reward",
    "Rollout",
    "RolloutEngine",
    "SampledTeacher",
    "Sampling",
    "ScoredRollout",
    "SignalSpec",
    "SpanTeacher",
    "Teacher",
    "TeacherInfo",
    "TeacherSignal",
    "TokenLogprobs",
    "TopKTeacher",
    "Unscored",
]

Level = Literal["full", "candidates", "topk", "sampled", "text"]
Divergence = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl"]
Origin = Literal["student", "reference", "teacher"]
FinishReason = Literal["stop", "length", "reference"]

LEVELS: tuple[Level, ...] = ("full", "candidates", "topk", "sampled", "text")
DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl")
IGNORE_INDEX = -100  # as a label: no ground truth
ALIGNED_ID, ALIGNED_SPAN, ALIGNED_RANK = 1, 2, 4  # what a row of `TeacherSignal.rows` holds


# ---------------------------------------------------------------- prompts and rollouts


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question as token ids. ``reference_ids`` is its true continuation, where there is one (labelled text).

    ``text`` or ``messages`` (role and content) is what it was before any tokenizer, where that is known. A prompt without ids is for a
    teacher that turns text into ids by itself (`TeacherInfo.takes_text`).
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    reference_ids: tuple[int, ...] | None = None
    source: str = ""
    text: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    teachers: tuple[tuple[str, float], ...] = ()  # where a run has several: who is asked about it, and with which weight

    @property
    def most_tokens(self) -> int:
        """Its tokens; of text the most that any tokenizer makes, one a byte and some around every message."""
        if self.token_ids:
            return len(self.token_ids)
        parts = [self.text, *(role + content for role, content in self.messages)]
        return sum(len(part.encode()) for part in parts) + 16 * len(parts)

    @property
    def is_text(self) -> bool:
        """Whether it has no ids, and something to make them of."""
        return not self.token_ids and bool(self.text or self.messages)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to write an answer. ``temperature`` divides the logits; ``top_p``=1 and ``top_k``=0 leave the distribution whole."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """The answers to one prompt that were drawn together and passed the filters: ``number`` is its name among those under way."""

    number: int
    size: int


@dataclass(frozen=True, slots=True, eq=False)
class Rollout:
    """One prompt with one answer to it.

    ``origin`` says who wrote the answer: the student (a rollout proper), the teacher, or the data set (``reference``). The last
    two are *labelled*: their tokens are targets for cross-entropy. ``logprobs`` [L] float32 are those sampled from, nats at the
    sampling temperature; None where nobody sampled. ``candidate_ids`` [L, M] int32 are the ids that a teacher is asked about at level
    ``candidates``: −1 is an empty slot, and no id comes twice in a row.
    """

    rollout_id: str
    prompt: Prompt
    token_ids: tuple[int, ...]
    origin: Origin = "student"
    finish_reason: FinishReason = "stop"
    logprobs: np.ndarray | None = None
    temperature: float = 1.0
    weights_version: int = 0
    draw: int = 0  # position in the order of drawing, within its update cycle
    candidate_ids: np.ndarray | None = None
    group: Group | None = None  # where answers to one prompt are judged together

    @property
    def is_labelled(self) -> bool:
        return self.origin != "student"

    @property
    def all_ids(self) -> tuple[int, ...]:
        return self.prompt.token_ids + self.token_ids

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Completion:
    """A teacher's own answer to a prompt.

    ``logprobs`` are those of its tokens, nats at the sampling temperature, before top-k and top-p; empty where they are not known.
    """

    prompt: Prompt
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    logprobs: tuple[float, ...] = ()


# ---------------------------------------------------------------- what a teacher offers, is asked, and answers


@dataclass(frozen=True, slots=True)
class Reward:
    """What a judge thinks of one answer; ``parts`` are what ``value`` is made of, by name, for the metrics."""

    value: float
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Offer:
    """One access level a teacher can give: its largest ``max_top_k`` and the temperatures it applies exactly."""

    level: Level
    max_top_k: int = 0
    temperature_min: float = 1.0
    temperature_max: float = 1.0
    tail: Literal["exact", "derived", "none"] = "exact"


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """Who a teacher is and what it can give. Hashes are lowercase SHA-256 hex; an empty one is unknown."""

    model: str
    vocab_size: int
    offers: tuple[Offer, ...]
    revision: str = ""
    weights_version: int = 0
    vocab_sha256: str = ""
    tokenizer_sha256: str = ""
    chat_template_sha256: str = ""
    max_sequence_tokens: int = 0  # prompt and answer together; 0: unknown
    max_request_tokens: int = 0  # of all sequences in flight from one client; 0: unknown
    price_per_million_tokens: float = 0.0
    currency: str = ""
    max_requests_per_second: float = 0.0  # of one client; 0: unknown
    takes_text: bool = False  # writes answers to prompts that are text or messages, by its own tokenizer

    def offer(self, level: Level) -> Offer | None:
        return next((offer for offer in self.offers if offer.level == level), None)


@dataclass(frozen=True, slots=True)
class SignalSpec:
    """What an objective asks of a teacher, for every response token of a rollout."""

    level: Level
    temperature: float = 1.0
    top_k: int = 0
    rollouts_only: bool = False  # labelled sequences are not asked about: nobody sampled their tokens


@dataclass(frozen=True, slots=True, eq=False)
class TeacherSignal:
    """What a teacher said of one rollout; row ``i`` is its distribution of response token ``i``. NumPy arrays, C order.

    full: ``logits`` [L, V] float16 (or float32), z − max(z) at temperature 1. topk, candidates: ``ids`` [L, K] int32 (−1 is
    an empty slot), ``logprobs`` [L, K] float32, ``log_tail`` [L] float32, at ``temperature``. topk and sampled also give
    ``sampled`` [L] float32, the logprob of the rollout's own token. text, where answers are judged: ``advantages`` [L] float32, and,
    for a student that shall stay near an earlier one, the latter's logprobs of the same tokens, ``reference_logprobs`` [L] float32.

    Of a teacher with other tokens, laid beside the student's, ``rows`` [L] uint8 says in flags what each row holds: ``ALIGNED_ID``, ids
    and logprobs as ever; ``ALIGNED_RANK``, its largest logprobs in descending order, without ids; ``ALIGNED_SPAN``, in ``advantages`` [L]
    float32 that of the span which the token is a part of. A row of 0 says nothing.
    """

    level: Level
    temperature: float = 1.0
    logits: np.ndarray | None = None
    ids: np.ndarray | None = None
    logprobs: np.ndarray | None = None
    log_tail: np.ndarray | None = None
    sampled: np.ndarray | None = None
    advantages: np.ndarray | None = None
    rows: np.ndarray | None = None
    reference_logprobs: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ScoredRollout:
    """A rollout with its signal; where it was judged also with its ``reward`` and the standard deviation of its group's rewards.

    Its tokens count ``weight`` times in the loss.
    """

    rollout: Rollout
    signal: TeacherSignal
    reward: Reward | None = None
    group_std: float = 0.0
    weight: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Unscored:
    """A rollout that gets no signal and is not trained on: ``reason`` is what is counted, ``detail`` is for a person."""

    rollout: Rollout
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class DistillBatch:
    """Sequences laid end to end, with no padding: all that a trainer ever sees.

    The body runs over the P packed tokens; the loss over the N rows in ``target_rows``, those whose hidden state predicts a
    response token. ``labels`` is −100 where there is no ground truth. ``teacher`` has N rows, or is None (plain CE); ``spans`` is what a
    teacher with other tokens says beyond that.
    """

    input_ids: Tensor  # [P] int64
    position_ids: Tensor  # [P] int64, from 0 in every sequence
    boundaries: Tensor  # [S + 1] int32, cumulative sequence lengths
    target_rows: Tensor  # [N] int64, into the packed tokens
    target_ids: Tensor  # [N] int64, the response tokens themselves
    labels: Tensor  # [N] int64
    token_weight: Tensor  # [N] float32
    teacher: OpTeacher | None
    response_tokens: int  # N
    rollout_tokens: int  # those of the N that the student wrote
    spans: SpanTeacher | None = None
    reference_logprobs: Tensor | None = None  # [N] float32, of the policy not to leave; 0 where there is no signal
    behavior_logprobs: Tensor | None = None  # [N] float32, those that target_ids were sampled from; NaN where nobody sampled
    sampled_logprobs: Tensor | None = None  # [N] float32, the teacher's of target_ids, where it told them beside other ids

    @property
    def packed_tokens(self) -> int:
        return int(self.input_ids.numel())


# ---------------------------------------------------------------- the seams


@runtime_checkable
class Teacher(Protocol):
    """Anything that can say what it thinks of a rollout. Scores come as each is ready, in any order."""

    info: TeacherInfo

    def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncIterator[ScoredRollout]: ...

    def complete(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Completion]: ...


@runtime_checkable
class Judge(Protocol):
    """Anything that says how good answers are, with a number for each whole answer."""

    async def rewards(self, group: Sequence[Rollout]) -> Sequence[Reward | Unscored]:
        """Of every answer in ``group``, all to one prompt, in their order. Several groups may be asked about at once.

        An answer that cannot be judged is `Unscored`. Raises `TeacherError` where the judge itself fails.
        """
        ...


@runtime_checkable
class RolloutEngine(Protocol):
    """Anything that can let the student write. Rollouts come as each is finished, in any order."""

    def generate(self, prompts: AsyncIterator[Prompt], sampling: Sampling) -> AsyncIterator[Rollout]: ...

    async def load_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None: ...
