"""Every measure of one student, at any stage of a run, on the same held-out prompts with the same seeds."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bbopd.config import EvalConfig
from bbopd.data.streams import each
from bbopd.errors import TeacherError
from bbopd.evaluate.agreement import AgreementMeter, signal_to_measure
from bbopd.evaluate.bits_per_byte import ByteMeter, score_text
from bbopd.evaluate.scores import Scores
from bbopd.evaluate.student import StudentView
from bbopd.pipeline.cycle import as_labelled
from bbopd.types import Prompt, Rollout, RolloutEngine, Sampling, ScoredRollout, SignalSpec, Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SEED = 20_177  # apart from the seeds of training cycles, and the same at every stage
KEPT_BYTES = 512 * 2**20


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation. A measure is None where it could not be taken: no teacher, no labelled text, no rollout.

    KL in nats per response token at temperature 1: ``kl`` is KL(teacher‖student), ``reverse_kl`` KL(student‖teacher);
    ``top1`` is the share of tokens at which both prefer the same next one. ``rollouts`` is the student's own text, sampled at
    temperature 1 and unfiltered, ``held_out`` the reference answers. ``standard_errors`` has the same keys.
    """

    stage: str
    step: int
    bits_per_byte: float | None = None
    kl_held_out: float | None = None
    kl_rollouts: float | None = None
    reverse_kl_held_out: float | None = None
    reverse_kl_rollouts: float | None = None
    top1_held_out: float | None = None
    top1_rollouts: float | None = None
    kl_is_bucketed: bool = False
    standard_errors: Mapping[str, float] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    sequences: Mapping[str, int] = field(default_factory=dict)
    seconds: float = 0.0
    seconds_by_part: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What an `EvalResult` is made of: its measures by name, item by item."""

    scores: Mapping[str, Scores]
    tokens: Mapping[str, int]
    sequences: Mapping[str, int]
    seconds: float
    seconds_by_part: Mapping[str, float]


class EvalSuite:
    """Built once from held-out prompts; `run` measures a student.

    Parameters
    ----------
    prompts
        Held-out prompts. The first ``config.sequences`` of those with a reference are the held-out text; ``config.rollouts``
        answers are sampled to prompts spread evenly over all of them.
    byte_counts_V
        From `bits_per_byte.token_byte_counts`, of the student's tokenizer.
    engine
        Writes the student's rollouts, with the weights it holds when `run` is called. None measures no rollouts.
    teacher
        None measures bits per byte alone.
    compute_dtype, vocab_size
        As in `StudentView`.
    kept_bytes
        The teacher's signals on held-out text do not change, so they are kept up to this size and asked for once; what does
        not fit is asked for again by every `run`.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        config: EvalConfig,
        *,
        byte_counts_V: Tensor,
        engine: RolloutEngine | None,
        teacher: Teacher | None,
        compute_dtype: torch.dtype | None = None,
        vocab_size: int | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._held_out = [prompt for prompt in prompts if prompt.reference_ids][: config.sequences]
        count = config.rollouts if prompts else 0
        self._rollout_prompts = [prompts[index * len(prompts) // count] for index in range(count)]
        self._max_new_tokens = config.max_new_tokens
        self._byte_counts_V = byte_counts_V
        self._engine = engine
        self._teacher = teacher
        self._want = _signal(teacher)
        self._compute_dtype = compute_dtype
        self._vocab_size = vocab_size
        self._kept: dict[str, ScoredRollout] = {}
        self._room = kept_bytes

    async def run(self, stage: str, model: PreTrainedModel, step: int) -> EvalResult:
        """Measure ``model``; ``stage`` and ``step`` are copied into the result. Raises what the teacher or the engine raises."""
        found = await self.measure(model)
        values = {name: scores.estimate() for name, scores in found.scores.items()}
        return EvalResult(
            stage=stage,
            step=step,
            **{name: estimate.value for name, estimate in values.items()},
            kl_is_bucketed=self.is_bucketed,
            standard_errors={name: estimate.standard_error for name, estimate in values.items() if estimate.standard_error is not None},
            tokens=found.tokens,
            sequences=found.sequences,
            seconds=round(found.seconds, 3),
            seconds_by_part={name: round(seconds, 3) for name, seconds in found.seconds_by_part.items()},
        )

    @property
    def is_bucketed(self) -> bool:
        """Whether the KL is over the teacher's best ids and one bucket for the rest."""
        return self._want is not None and self._want.level == "topk"

    async def measure(self, model: PreTrainedModel) -> Measures:
        """Every measure of ``model``, item by item. Raises what the teacher or the engine raises."""
        clock = _Clock()
        student = StudentView(model, compute_dtype=self._compute_dtype, vocab_size=self._vocab_size)
        scores: dict[str, Scores] = {}
        tokens: dict[str, int] = {}
        sequences: dict[str, int] = {}

        if self._held_out:
            with clock.part("held_out"):
                text, agreement = await self._measure_held_out(student)
            scores["bits_per_byte"] = text.scores()
            scores |= {f"{name}_held_out": found for name, found in agreement.items()}
            tokens["held_out"], sequences["held_out"] = text.result().tokens, len(self._held_out)
        if self._engine is not None and self._teacher is not None and self._rollout_prompts:
            with clock.part("sampling"):
                rollouts = await self._sample(self._engine)
            tokens["rollouts"], sequences["rollouts"] = sum(map(len, rollouts)), len(rollouts)
            with clock.part("rollouts"):
                agreement = await self._agreement(student, self._teacher, rollouts)
            scores |= {f"{name}_rollouts": found for name, found in agreement.items()}
        return Measures(scores, tokens, sequences, clock.elapsed, clock.parts)

    async def _sample(self, engine: RolloutEngine) -> list[Rollout]:
        sampling = Sampling(max_new_tokens=self._max_new_tokens, temperature=1.0, seed=_SEED)
        rollouts = [rollout async for rollout in engine.generate(each(self._rollout_prompts), sampling)]
        return sorted((rollout for rollout in rollouts if len(rollout)), key=lambda rollout: rollout.draw)

    async def _measure_held_out(self, student: StudentView) -> tuple[ByteMeter, dict[str, Scores]]:
        if self._teacher is None:
            return score_text(student, self._held_out, self._byte_counts_V), {}
        assert self._want is not None, "a teacher always comes with what it is asked"
        text = ByteMeter(self._byte_counts_V)
        meter = AgreementMeter(student, self._want, text=text)
        rollouts = [as_labelled(prompt, draw=index) for index, prompt in enumerate(self._held_out)]
        for rollout in rollouts:
            if rollout.rollout_id in self._kept:
                meter.add(self._kept[rollout.rollout_id])
        unknown = [rollout for rollout in rollouts if rollout.rollout_id not in self._kept]
        if unknown:
            async for scored in self._teacher.score(each(unknown), self._want):
                self._keep(scored)
                meter.add(scored)
        agreement = meter.scores()
        return text, agreement

    async def _agreement(self, student: StudentView, teacher: Teacher, rollouts: Iterable[Rollout]) -> dict[str, Scores]:
        assert self._want is not None, "a teacher always comes with what it is asked"
        meter = AgreementMeter(student, self._want)
        async for scored in teacher.score(each(rollouts), self._want):
            meter.add(scored)
        return meter.scores()

    def _keep(self, scored: ScoredRollout) -> None:
        signal = scored.signal
        arrays = (signal.logits, signal.ids, signal.logprobs, signal.log_tail, signal.sampled)
        size = sum(array.nbytes for array in arrays if array is not None)
        if size <= self._room:
            self._room -= size
            self._kept[scored.rollout.rollout_id] = scored


def _signal(teacher: Teacher | None) -> SignalSpec | None:
    if teacher is None:
        return None
    want = signal_to_measure(teacher.info)
    if want is None:
        offered = ", ".join(offer.level for offer in teacher.info.offers) or "nothing"
        raise TeacherError(
            f"agreement with {teacher.info.model} cannot be measured: it offers {offered}, and full or topk at temperature 1 is needed"
        )
    return want


class _Clock:
    """Seconds, all together and by part."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.parts: dict[str, float] = {}

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.parts[name] = time.monotonic() - start
