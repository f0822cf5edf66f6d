"""By what several answers of a teacher to one prompt are compared: the student, a judge, or a function of the user's."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from bbopd.data.hooks import load_score
from bbopd.modeling import output_head
from bbopd.modeling.response_logprobs import response_logprobs
from bbopd.teachers.chosen import Answer, Scores
from bbopd.types import Judge, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def grades(judge: Judge) -> Scores:
    """What ``judge`` gives them; an answer that it cannot judge will not do."""

    async def scores(answers: Sequence[Answer]) -> Sequence[float | None]:
        rewards = await judge.rewards([answer.rollout for answer in answers])
        return [reward.value if isinstance(reward, Reward) else None for reward in rewards]

    return scores


def student_logprob(model: PreTrainedModel, *, compute_dtype: torch.dtype, vocab_size: int | None) -> Scores:
    """The mean logprob of a token at temperature 1, by the student as it is when it first meets the prompt."""
    head = output_head(model, vocab_size)

    async def scores(answers: Sequence[Answer]) -> Sequence[float | None]:
        found: list[float] = []
        for answer in answers:
            logprobs = response_logprobs(model, head, [answer.rollout], compute_dtype=compute_dtype)
            found.append(float(logprobs.mean()))
            await asyncio.sleep(0)  # others get a turn
        return found

    return scores


def own_score(name: str) -> Scores:
    """The user's function ``name``, of the prompt and the answer as text. Raises `ConfigError` where there is none."""
    score = load_score(name, "teacher.answers.best_by")

    async def scores(answers: Sequence[Answer]) -> Sequence[float | None]:
        return [score(answer.rollout.prompt, answer.completion.text) for answer in answers]

    return scores
