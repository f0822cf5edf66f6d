"""How far a student is from its teacher, token by token, at temperature 1.

From a ``full`` signal the divergences are exact (up to its fp16). From a ``topk`` one only the forward KL is given, over the
teacher's ids and one bucket for the rest: a lower bound of the full KL, and marked as bucketed.

Shape suffixes: ``N`` response tokens, ``K`` top-k, ``V`` vocabulary, ``S`` sequences.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bbopd.data.assemble import assemble
from bbopd.errors import DataError
from bbopd.evaluate.bits_per_byte import ByteMeter
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.statistics import Estimate
from bbopd.evaluate.student import PACKED_TOKENS, StudentView, sum_by_sequence, token_count
from bbopd.modeling import to_device
from bbopd.types import FullTeacher, OpTeacher, ScoredRollout, SignalSpec, TeacherInfo, TopKTeacher

_TOP_K = 64


@dataclass(frozen=True, slots=True)
class Agreement:
    """Token-weighted means with standard errors clustered by sequence; KL in nats per token, ``top1`` in [0, 1]."""

    forward_kl: Estimate  # KL(teacher || student)
    reverse_kl: Estimate | None  # KL(student || teacher); None where the signal does not give it
    top1: Estimate  # share of tokens at which both prefer the same next token
    tokens: int
    sequences: int
    is_bucketed: bool


def signal_to_measure(info: TeacherInfo) -> SignalSpec | None:
    """What to ask a teacher for: ``full`` where it offers that at temperature 1, else its best ids, else None."""
    offers = [offer for offer in info.offers if offer.temperature_min <= 1.0 <= offer.temperature_max]
    if any(offer.level == "full" for offer in offers):
        return SignalSpec("full")
    topk = next((offer for offer in offers if offer.level == "topk"), None)
    return SignalSpec("topk", top_k=min(_TOP_K, topk.max_top_k)) if topk is not None else None


class AgreementMeter:
    """Takes scored rollouts as they come and holds no more than one forward pass of them.

    Where ``text`` is given, it gets the student's log-probabilities of the same tokens, which cost nothing more.
    """

    def __init__(
        self, student: StudentView, want: SignalSpec, *, text: ByteMeter | None = None, packed_tokens: int = PACKED_TOKENS
    ) -> None:
        if want.level not in ("full", "topk") or want.temperature != 1.0:
            raise ValueError(f"agreement is measured from full or topk signals at temperature 1, not {want.level} at {want.temperature}")
        self._student = student
        self._want = want
        self._text = text
        self._packed_tokens = packed_tokens
        self._waiting: list[ScoredRollout] = []
        self._waiting_tokens = 0
        self._items: list[str] = []
        self._sums: dict[str, list[float]] = {"tokens": [], "forward_kl": [], "reverse_kl": [], "top1": []}

    def add(self, scored: ScoredRollout) -> None:
        """Take one scored rollout; measures those that wait once a forward pass is full."""
        length = token_count(scored)
        if self._waiting and self._waiting_tokens + length > self._packed_tokens:
            self._measure_waiting()
        self._waiting.append(scored)
        self._waiting_tokens += length

    def result(self) -> Agreement:
        """Raises `DataError` where no token was scored."""
        scores = self.scores()
        tokens = self._sums["tokens"]
        return Agreement(
            forward_kl=scores["kl"].estimate(),
            reverse_kl=scores["reverse_kl"].estimate() if "reverse_kl" in scores else None,
            top1=scores["top1"].estimate(),
            tokens=int(sum(tokens)),
            sequences=len(tokens),
            is_bucketed=self._want.level != "full",
        )

    def scores(self) -> dict[str, Scores]:
        """``kl``, ``top1`` and, from a ``full`` signal, ``reverse_kl``, by prompt. Raises `DataError` where no token was scored."""
        self._measure_waiting()
        tokens = self._sums["tokens"]
        if not sum(tokens):
            raise DataError("no token was scored by the teacher: agreement with it cannot be measured")
        names = {"kl": "forward_kl", "top1": "top1"} | ({"reverse_kl": "reverse_kl"} if self._want.level == "full" else {})
        return {
            name: Scores(tuple(self._items), np.array([self._sums[key], tokens]).T, higher_is_better=name == "top1")
            for name, key in names.items()
        }

    def _measure_waiting(self) -> None:
        if not self._waiting:
            return
        rollouts = [scored.rollout for scored in self._waiting]
        batch = assemble(self._waiting, self._want)
        self._waiting, self._waiting_tokens = [], 0
        self._items.extend(rollout.prompt.prompt_id for rollout in rollouts)
        assert batch.teacher is not None, "scored rollouts make a batch with a teacher"
        teacher = to_device(batch.teacher, self._student.device)
        hidden_ND = self._student.hidden(batch)
        own = self._student.logprobs(hidden_ND, top_k=1, token_ids=batch.target_ids.to(self._student.device))
        assert own.topk_ids is not None, "top_k was asked for"
        assert own.sampled is not None, "token_ids were given"
        if self._text is not None:
            self._text.add(rollouts, batch, own.sampled)
        found = {"forward_kl": self._student.divergence(hidden_ND, teacher, "forward_kl")}
        if self._want.level == "full":
            found["reverse_kl"] = self._student.divergence(hidden_ND, teacher, "reverse_kl")
        found["top1"] = own.topk_ids[:, 0] == teacher_best(teacher)
        valid_N = torch.ones(len(hidden_ND), dtype=torch.bool) if teacher.valid is None else teacher.valid.cpu()
        for name, values_N in (found | {"tokens": valid_N}).items():
            self._sums[name].extend(sum_by_sequence(torch.where(valid_N, values_N.double().cpu(), 0.0), batch))


def teacher_best(teacher: OpTeacher) -> Tensor:
    """The id [N] that the teacher holds most likely."""
    if isinstance(teacher, TopKTeacher):
        best_N1 = torch.where(teacher.ids < 0, -torch.inf, teacher.logprobs.float()).argmax(dim=-1, keepdim=True)
        return teacher.ids.gather(1, best_N1)[:, 0]
    assert isinstance(teacher, FullTeacher)
    assert teacher.logits is not None, "a teacher that is asked over the wire gives logits"
    return teacher.logits.argmax(dim=-1)
