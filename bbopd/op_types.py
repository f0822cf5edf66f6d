"""What the two ops take and return, as frozen dataclasses; `bbopd.types` has them too.

Nothing here imports torch. Shape suffixes: ``N`` tokens, ``D`` hidden, ``V`` vocabulary, ``K`` top-k, ``M`` candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FullTeacher:
    """A teacher whose raw logits are known: given, or computed as ``hidden @ weight.T`` chunk by chunk.

    ``logits`` [N, V] (any float dtype, temperature 1, any constant per row), or ``hidden`` [N, Dt] with ``weight`` [V, Dt]
    and the head's own ``bias`` [V], ``logit_scale`` and ``logit_softcap``. ``valid`` [N] bool marks the tokens that carry
    a signal (all, where it is None). The op applies the temperature.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TopKTeacher:
    """The teacher's own best tokens: ``ids`` [N, K] (−1 is an empty slot), ``logprobs`` [N, K], ``log_tail`` [N].

    ``log_tail`` is the logarithm of the mass outside ``ids``; all of it was taken at ``temperature``.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CandidateTeacher:
    """Teacher logprobs at ids that the student chose; fields as in `TopKTeacher`."""

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor
    temperature: float = 1.0
    valid: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class SampledTeacher:
    """One number a token: ``token_ids`` [N] that were sampled at ``behavior_logprobs`` [N], and what is thought of each.

    That is either the teacher's ``logprobs`` [N], of which log p - log q_old is the advantage, or ``advantages`` [N] of any sign and
    origin (rewards of whole answers, say).
    """

    token_ids: Tensor
    behavior_logprobs: Tensor
    logprobs: Tensor | None = None
    advantages: Tensor | None = None
    temperature: float = 1.0
    valid: Tensor | None = None


OpTeacher = FullTeacher | TopKTeacher | CandidateTeacher | SampledTeacher


@dataclass(frozen=True, slots=True, eq=False)
class SpanTeacher:
    """What a teacher with other tokens says where they are not the student's one by one; for an objective, not for the ops.

    ``sampled`` has one advantage for all tokens of a span of the student's own text, valid there. Where a span begins, in the rows
    ``rank_rows`` [R] of the N, the teacher's K largest logprobs stand in descending order, whatever their tokens: ``rank_logprobs`` [R, K],
    ``rank_log_tail`` [R]. ``valid`` [N]: the rows that have either.
    """

    sampled: SampledTeacher
    rank_rows: Tensor
    rank_logprobs: Tensor
    rank_log_tail: Tensor
    valid: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class DistillLoss:
    """``loss`` scalar (differentiable); ``ce`` and ``kd`` [N], unweighted, detached, nats (``kd`` includes T² where asked)."""

    loss: Tensor
    ce: Tensor
    kd: Tensor
    metrics: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class TokenLogprobs:
    """What `linear_logprobs` found, in fp32 nats at the temperature asked; fields not asked for are None."""

    logsumexp: Tensor  # [N]
    sampled: Tensor | None = None  # [N]
    topk_ids: Tensor | None = None  # [N, K] int64
    topk_logprobs: Tensor | None = None  # [N, K]
    log_tail: Tensor | None = None  # [N]
    candidates: Tensor | None = None  # [N, M]
    candidates_log_tail: Tensor | None = None  # [N]
