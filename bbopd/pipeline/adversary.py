"""The other side of adversarial distillation: a discriminator that rewards the student's answers, and learns from the same answers.

In the warm-up it learns to tell the student's answers from the teacher's while the student learns from the latter by cross-entropy. Then
every answer of the student is rewarded with the discriminator's score, and from the warm-up's last student it shall not go far.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bbopd.config import RunConfig
from bbopd.data.assemble import Item
from bbopd.data.streams import each
from bbopd.errors import CheckpointError, TrainingError
from bbopd.objectives.bradley_terry import PairScores, bradley_terry
from bbopd.objectives.group_advantages import group_advantages, group_std
from bbopd.pipeline.cycle import as_generator
from bbopd.pipeline.progress import Progress
from bbopd.teachers.written import WritingTeacher
from bbopd.trainer.discriminator import Contest, Discriminator
from bbopd.trainer.reference_policy import ReferencePolicy
from bbopd.types import Reward, Rollout, RolloutEngine, Sampling, ScoredRollout, SignalSpec, TeacherSignal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(slots=True)
class _Shown:
    """What the discriminator has been shown in a cycle, and what it said of it, by the place in the cycle."""

    contests: dict[int, Contest] = field(default_factory=dict)
    scores: dict[int, PairScores] = field(default_factory=dict)

    def add(self, place: int, contest: Contest, scores: PairScores) -> None:
        self.contests[place], self.scores[place] = contest, scores

    def in_order(self) -> tuple[list[Contest], PairScores]:
        places = sorted(self.contests)
        scores = [self.scores[place] for place in places]
        prompt = [torch.full_like(one.prompt, index) for index, one in enumerate(scores)]
        together = PairScores(torch.cat([one.teacher for one in scores]), torch.cat([one.student for one in scores]), torch.cat(prompt))
        return [self.contests[place] for place in places], together


class Adversary:
    """What the loop asks as its teacher, and lets learn once it trains.

    Parameters
    ----------
    teacher
        Writes the answers that the discriminator compares the student's with.
    make_reference
        Copies the student as it then is.
    divide_by_std
        As in `group_advantages`.
    is_frozen
        The discriminator learns in the warm-up alone.
    length_alarm
        By which share the student's answers may be longer or shorter than the teacher's before ``note`` is told.
    """

    def __init__(
        self,
        discriminator: Discriminator,
        teacher: WritingTeacher,
        make_reference: Callable[[], ReferencePolicy],
        *,
        divide_by_std: bool = True,
        is_frozen: bool = False,
        length_alarm: float,
        note: Callable[[str], None],
    ) -> None:
        self.discriminator = discriminator
        self.teacher = teacher
        self._make_reference = make_reference
        self._reference: ReferencePolicy | None = None
        self._divide_by_std = divide_by_std
        self._is_frozen = is_frozen
        self._length_alarm = length_alarm
        self._note = note
        self._is_alarmed = False
        self._cycle = 0
        self._shown = _Shown()

    def begin_cycle(self, cycle: int) -> None:
        """Whatever an earlier cycle has shown and not trained on is forgotten."""
        self._cycle = cycle
        self._shown = _Shown()

    def end_warm_up(self) -> None:
        """From here on the student is held to what it is now; nothing, where it is held to something already."""
        if self._reference is None:
            self._reference = self._make_reference()

    # ------------------------------------------------------------ what the student is told

    async def score(self, rollouts: AsyncIterator[Rollout], want: SignalSpec) -> AsyncGenerator[ScoredRollout, None]:
        """Labelled sequences with the teacher's answer in place of their own; the student's, in groups, each with its advantage.

        Raises what the teacher raises. Advantages by a discriminator that has diverged are NaN: nobody trains on them, as `learn` comes
        first.
        """
        groups: dict[str, list[Rollout]] = {}

        async def to_write() -> AsyncGenerator[Rollout, None]:
            async with aclosing(as_generator(rollouts)) as source:
                async for rollout in source:
                    if rollout.group is None:
                        yield rollout
                        continue
                    name = f"group {rollout.group.number}"
                    groups.setdefault(name, []).append(rollout)
                    if len(groups[name]) == rollout.group.size:
                        yield replace(rollout, rollout_id=name)

        questions = to_write()
        async with aclosing(questions), aclosing(as_generator(self.teacher.score(questions, want))) as answers:
            async for answered in answers:
                group = groups.pop(answered.rollout.rollout_id, None)
                for scored in [answered] if group is None else self._reward(group, answered.rollout):
                    yield scored

    def _reward(self, group: Sequence[Rollout], answer: Rollout) -> list[ScoredRollout]:
        assert self._reference is not None, "rewards begin after the warm-up"
        rewards = self._compare(answer, group).student.tolist()
        with np.errstate(invalid="ignore"):  # of rewards that are not finite
            advantages, std = group_advantages(rewards, divide_by_std=self._divide_by_std), group_std(rewards)
        near = self._reference.logprobs(group)
        return [
            ScoredRollout(
                rollout,
                TeacherSignal("text", advantages=np.full(len(rollout), advantage, np.float32), reference_logprobs=logprobs),
                Reward(reward),
                std,
            )
            for rollout, reward, advantage, logprobs in zip(group, rewards, advantages, near, strict=True)
        ]

    def _compare(self, answer: Rollout, group: Sequence[Rollout]) -> PairScores:
        contest = Contest(answer.prompt.token_ids, answer.token_ids, tuple(rollout.token_ids for rollout in group))
        scores = self.discriminator.score([contest], seed=self._cycle)
        self._shown.add(answer.draw, contest, scores)
        return scores

    # ------------------------------------------------------------ what the discriminator learns

    async def face(self, items: Sequence[Item], engine: RolloutEngine, sampling: Sampling) -> int:
        """In the warm-up: one answer of the student's to each prompt that ``items`` hold the teacher's to. How many tokens it wrote."""
        written = {item.rollout.draw: item.rollout for item in items if isinstance(item, ScoredRollout)}
        order = sorted(written)
        tokens = 0
        prompts = each([written[draw].prompt for draw in order])
        async with aclosing(as_generator(engine.generate(prompts, sampling))) as rollouts:
            async for rollout in rollouts:
                tokens += len(rollout)
                if len(rollout):
                    self._compare(written[order[rollout.draw]], [rollout])
        return tokens

    def learn(self) -> Mapping[str, float]:
        """One step, unless it is frozen, on all that this cycle has shown; its figures for metrics.jsonl.

        Raises `TrainingError` where it has diverged: nothing of this cycle is to be trained on then.
        """
        if not self._shown.contests:
            return {}
        contests, scores = self._shown.in_order()
        if not scores.is_finite:
            raise TrainingError("the discriminator's scores are not finite")
        stands_still = self._is_frozen and self._reference is not None
        learned = None if stands_still else self.discriminator.learn(contests, scores, seed=self._cycle)
        figures = {
            **(learned or {"discriminator_loss": bradley_terry(scores).item()}),
            "discriminator_accuracy": scores.accuracy(),
            "discriminator_margin": float(scores.margins.mean()),
            **self._compare_lengths(contests),
        }
        self._shown = _Shown()
        return figures

    def _compare_lengths(self, contests: Sequence[Contest]) -> dict[str, float]:
        teacher = float(np.mean([len(contest.teacher) for contest in contests]))
        student = float(np.mean([len(answer) for contest in contests for answer in contest.students]))
        drift = student / teacher - 1.0
        is_alarmed = self._reference is not None and abs(drift) > self._length_alarm
        if is_alarmed and not self._is_alarmed:
            self._note(
                f"the student's answers have {1 + drift:.2f} times the tokens of the teacher's to the same prompts: look "
                "at held-out figures before you trust its reward; a higher objective.gad.discriminator_lr, or kl_weight, holds it back"
            )
        self._is_alarmed = is_alarmed
        return {"teacher_length_mean": teacher, "student_length_mean": student, "length_drift": drift, "length_alarm": float(is_alarmed)}

    # ------------------------------------------------------------ for a checkpoint

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """By the name of the file that shall hold them."""
        held = {} if self._reference is None else {"reference": self._reference.tensors()}
        return {"discriminator": self.discriminator.tensors(), **held}

    def load_tensors(self, files: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Go on from where `tensors` were taken. Raises `CheckpointError` for those of other models."""
        try:
            self.discriminator.load_tensors(files["discriminator"])
            self._reference = self._make_reference() if "reference" in files else None
            if self._reference is not None:
                self._reference.load_tensors(files["reference"])
        except (KeyError, ValueError) as error:
            raise CheckpointError(f"the checkpoint does not fit this adversary ({error}): set output to a new folder") from error


def open_adversary(
    config: RunConfig, model: PreTrainedModel, teacher: WritingTeacher, dtype: torch.dtype, vocab_size: int, progress: Progress
) -> Adversary:
    """The adversary of a run's student, as that is now: it begins with its weights."""
    gad, train = config.objective.gad, config.train
    copy = partial(ReferencePolicy, model, compute_dtype=dtype, vocab_size=vocab_size, micro_batch_tokens=train.micro_batch_tokens)
    discriminator = Discriminator(model, train=train, learning_rate=gad.discriminator_lr, compute_dtype=dtype)
    return Adversary(
        discriminator,
        teacher,
        copy,
        divide_by_std=config.objective.divide_by_std,
        is_frozen=gad.frozen,
        length_alarm=gad.length_alarm,
        note=progress.note,
    )
