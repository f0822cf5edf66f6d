"""Tokens that a run will write, have scored and train on, from its budgets and the lengths of its texts; and what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bbopd.config import RunConfig
from bbopd.types import SignalSpec

if TYPE_CHECKING:
    from bbopd.data.prompts import PromptSet

__all__ = ["Cycle", "Forecast", "Lengths", "Prices", "cycle_of", "forecast", "mean", "price"]


@dataclass(frozen=True, slots=True)
class Lengths:
    """Mean tokens of a text. ``answer`` is what the student writes, ``reference`` the known continuation of ``labelled_prompt``; a
    ``reference`` of 0 says that there is none."""

    prompt: float
    answer: float
    labelled_prompt: float
    reference: float

    @classmethod
    def of(cls, config: RunConfig, prompts: PromptSet, answer: float) -> Lengths:
        """As the data have them."""
        labelled = [prompt for prompt in prompts.to_train if prompt.reference_ids or config.teacher_writes]
        reference = answer if config.teacher_writes else mean([len(one.reference_ids or ()) for one in labelled])
        prompt = mean([len(prompt.token_ids) for prompt in prompts.to_train])
        return cls(prompt, answer, mean([len(one.token_ids) for one in labelled]), reference)

    @classmethod
    def given(
        cls, config: RunConfig, *, answer: float | None = None, prompt: float | None = None, reference: float | None = None
    ) -> Lengths:
        """What is given; of the rest the most that the configuration allows."""
        longest = config.teacher.answers.max_new_tokens if config.teacher_writes else config.data.response_tokens
        room = min(config.data.prompt_tokens, config.train.max_seq_len - config.rollouts.max_new_tokens)
        prompt = room if prompt is None else prompt
        return cls(prompt, answer or config.rollouts.max_new_tokens, prompt, longest if reference is None else reference)


@dataclass(frozen=True, slots=True)
class Forecast:
    """Of a whole run: the student's answers and their tokens, without and with prompts; then those of all responses."""

    answers: float
    written_tokens: float
    written_sequence_tokens: float
    response_tokens: float
    sequence_tokens: float

    def asked(self, want: SignalSpec, config: RunConfig) -> Forecast:
        """What of it the teacher is asked about: of a game, one answer of its own beside each group of the student's."""
        if want.rollouts_only:
            return replace(self, response_tokens=self.written_tokens, sequence_tokens=self.written_sequence_tokens)
        if config.objective.name != "gad":
            return self
        spared = 1 - 1 / config.rollouts.samples_per_prompt
        return replace(
            self,
            response_tokens=self.response_tokens - spared * self.written_tokens,
            sequence_tokens=self.sequence_tokens - spared * self.written_sequence_tokens,
        )


def forecast(config: RunConfig, lengths: Lengths) -> Forecast:
    """Tokens of ``config``'s run. Evaluation is not counted."""
    train, rollouts = config.train, config.rollouts
    per_cycle, reference = config.rollouts_per_cycle, lengths.reference
    answers = train.on_policy_tokens / lengths.answer if config.writes_rollouts else 0.0
    references = train.cold_start_tokens / reference if reference else 0.0
    if config.writes_rollouts:
        references += answers * (rollouts.per_update - per_cycle) / per_cycle
    elif reference and train.labelled_tokens is not None:
        references += train.labelled_tokens / reference
    elif train.total_steps is not None:
        references += train.total_steps * train.batch_tokens / max(1.0, reference)
    written, known = answers * lengths.answer, references * reference
    share = 1.0
    if train.total_steps is not None:  # the other limit: whichever is reached first
        share = min(1.0, train.total_steps * train.batch_tokens / max(1.0, written + known))
    with_prompts = written + answers * lengths.prompt
    sequences = with_prompts + known + references * lengths.labelled_prompt
    return Forecast(share * answers, share * written, share * with_prompts, share * (written + known), share * sequences)


@dataclass(frozen=True, slots=True)
class Cycle:
    """One update cycle in its middle course: sequences and response tokens; ``packed`` counts prompts too; ``steps`` of the optimizer."""

    rollouts: int
    sequences: int
    written: float
    scored: float
    trained: float
    packed: float
    steps: int


def cycle_of(config: RunConfig, want: SignalSpec | None, lengths: Lengths) -> Cycle:
    """What `forecast` counts, of one cycle after the cold start."""
    rollouts, sequences = config.rollouts_per_cycle, config.rollouts.per_update
    labelled = sequences - rollouts
    written, known = rollouts * lengths.answer, labelled * lengths.reference
    with_prompts = written + rollouts * lengths.prompt
    packed = with_prompts + known + labelled * lengths.labelled_prompt
    asked = 0.0
    if want is not None:
        asked = Forecast(rollouts, written, with_prompts, written + known, packed).asked(want, config).response_tokens
    trained = written + known
    return Cycle(rollouts, sequences, written, asked, trained, packed, max(1, round(trained / config.train.batch_tokens)))


@dataclass(frozen=True, slots=True)
class Prices:
    """For a million tokens, in ``currency``."""

    prompt: float
    answer: float
    currency: str


def price(config: RunConfig, asked: Forecast, prices: Prices, *, rubric_tokens: int = 0) -> float:
    """What a teacher costs that is ``asked`` all this; what it scores is priced as prompts are, what it writes as answers.

    ``rubric_tokens`` are read beside every answer that it grades.
    """
    if config.teacher.grading is not None and config.objective.judges_groups:
        read, replies = asked.sequence_tokens + asked.answers * rubric_tokens, asked.answers * config.teacher.answers.max_new_tokens
        return (read * prices.prompt + replies * prices.answer) / 1e6
    written = asked.response_tokens if config.teacher.signal == "text" else 0.0
    read = asked.sequence_tokens - written
    return (read * prices.prompt + written * prices.answer) * config.teacher.answers.samples / 1e6


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
